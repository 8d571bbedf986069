//! The contract in its three forms: the .idl, its Rust mirror, the bytes on the wire; and the Python dataclasses.
//!
//! After a change on purpose (a new version: types are final) `MUSTER_BLESS=1 cargo test -p muster-idl` writes golden
//! bytes that are missing; it never changes those that are there.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{collections::BTreeMap, path::Path, process::Command};

use byteorder::LittleEndian;
use muster_idl::{Topic, samples, topics, v1};

#[path = "../../xtask/src/python_idl.rs"]
#[allow(dead_code)]
mod python_idl;

const IDL: &str = include_str!("../idl/muster_v1.idl");
const MIRROR: &str = include_str!("../src/v1.rs");

/// The declarations inside `types! { … }`, `keys! { … }` or `enums! { … }` of the mirror, by name.
fn mirror(section: &str) -> BTreeMap<String, Vec<(String, String)>> {
    let start = MIRROR.find(&format!("\n{section}! {{\n")).expect("the section is there") + section.len() + 5;
    let body = &MIRROR[start..start + MIRROR[start..].find("\n}\n").expect("the section ends")];
    let mut found = BTreeMap::new();
    let mut name = None;
    // one declaration may stand on one line: `HostKey { host: String, }`
    let text = body.lines().filter(|l| !l.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    for token in text.split_inclusive(['{', '}', ',']) {
        let (token, end) = token.split_at(token.len() - 1);
        let token = token.trim();
        match end {
            "{" => {
                name = Some(token.to_string());
                found.insert(token.to_string(), Vec::new());
            }
            "," => {
                let parts = token.split_once(':').or_else(|| token.split_once('=')).expect("a field or a literal");
                let fields = found.get_mut(name.as_ref().expect("inside a declaration")).expect("was inserted");
                fields.push((parts.0.trim().to_string(), parts.1.trim().to_string()));
            }
            _ => name = None,
        }
    }
    found
}

fn rust_type(kind: &str) -> String {
    match kind {
        "string" => "String".into(),
        "boolean" => "bool".into(),
        "octet" => "u8".into(),
        "unsigned short" => "u16".into(),
        "unsigned long" => "u32".into(),
        "unsigned long long" => "u64".into(),
        "double" => "f64".into(),
        other => match other.strip_prefix("sequence<").and_then(|k| k.strip_suffix('>')) {
            Some(element) => format!("Vec<{}>", rust_type(element)),
            None => other.into(),
        },
    }
}

#[test]
fn the_mirror_has_the_fields_of_the_idl_in_its_order() {
    let idl = python_idl::parse(IDL).unwrap();
    let types = mirror("types");
    assert_eq!(
        idl.structs.iter().map(|s| s.name.clone()).collect::<std::collections::BTreeSet<_>>(),
        types.keys().cloned().collect()
    );
    for declared in &idl.structs {
        let expected: Vec<_> = declared.fields.iter().map(|f| (f.name.clone(), rust_type(&f.kind))).collect();
        assert_eq!(expected, types[&declared.name], "{}", declared.name);
    }
}

#[test]
fn the_mirror_has_the_literals_of_the_idl_in_its_order() {
    let idl = python_idl::parse(IDL).unwrap();
    let enums = mirror("enums");
    assert_eq!(idl.enums.len(), enums.len());
    for declared in &idl.enums {
        let snake = |name: &str| python_idl::topic_name(&[], name).trim_start_matches('_').to_uppercase();
        let expected: Vec<_> = enums[&declared.name]
            .iter()
            .map(|(literal, _)| format!("{}_{}", snake(&declared.name), snake(literal)))
            .collect();
        assert_eq!(expected, declared.literals, "{}", declared.name);
    }
}

/// Calls the macro with each topic type and its sample.
macro_rules! each_topic {
    ($check:ident) => {
        $check(&samples::heartbeat());
        $check(&samples::physical_host());
        $check(&samples::host_metrics());
        $check(&samples::store_state());
        $check(&samples::store_health());
        $check(&samples::virtual_system());
        $check(&samples::vm_metrics());
        $check(&samples::volume_metrics());
        $check(&samples::verdict());
        $check(&samples::progress());
        $check(&samples::event());
        $check(&samples::controller_state());
        $check(&samples::group_set());
        $check(&samples::group_command());
    };
}

fn type_name<T: Topic>() -> &'static str {
    T::INFO.type_name.strip_prefix("muster::v1::").expect("types are in muster::v1")
}

#[test]
fn keys_are_the_key_fields_of_the_idl_in_its_order() {
    fn check<T: Topic>(sample: &T) {
        let idl = python_idl::parse(IDL).unwrap();
        let declared = idl.structs.iter().find(|s| s.name == type_name::<T>()).expect("a topic's type is in the idl");
        let keys: Vec<&str> = declared.fields.iter().filter(|f| f.key).map(|f| f.name.as_str()).collect();
        let value = serde_json::to_value(sample).unwrap();
        let key = serde_json::to_value(sample.key()).unwrap();
        let key = key.as_object().expect("a key is a struct");
        assert_eq!(key.keys().map(String::as_str).collect::<Vec<_>>(), keys, "{}", T::INFO.name);
        for (name, part) in key {
            assert_eq!(part, &value[name], "{} {name}", T::INFO.name);
        }
        assert_eq!(python_idl::topic_name(&idl.modules, type_name::<T>()), T::INFO.name);
    }
    each_topic!(check);
    let keyed = python_idl::parse(IDL).unwrap().structs.iter().filter(|s| s.fields.iter().any(|f| f.key)).count();
    assert_eq!(keyed, topics::ALL.len(), "a keyed type without a topic");
}

/// Wire format v1, pinned: CDR little-endian without encapsulation header.
#[test]
fn golden_bytes_encode_and_decode() {
    fn check<T: Topic + PartialEq + std::fmt::Debug>(sample: &T) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/v1/{}.cdr", type_name::<T>()));
        let bytes = cdr_encoding::to_vec::<T, LittleEndian>(sample).unwrap();
        if !path.exists() && std::env::var_os("MUSTER_BLESS").is_some() {
            std::fs::write(&path, &bytes).unwrap();
        }
        let golden = std::fs::read(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()));
        assert_eq!(bytes, golden, "{} encodes otherwise than pinned", T::INFO.type_name);
        let (decoded, consumed) = cdr_encoding::from_bytes::<T, LittleEndian>(&golden).unwrap();
        assert_eq!((&decoded, consumed), (sample, golden.len()));
        for cut in 0..golden.len() {
            // never a panic; and a truncated sample is an error, never a shorter value
            assert!(
                cdr_encoding::from_bytes::<T, LittleEndian>(&golden[..cut]).is_err(),
                "{} cut at {cut}",
                T::INFO.name
            );
        }
    }
    each_topic!(check);
}

/// An enum travels as the number of its literal, counted from 0.
#[test]
fn enums_travel_as_their_position() {
    for (position, verb) in v1::Verb::ALL.iter().enumerate() {
        let bytes = cdr_encoding::to_vec::<_, LittleEndian>(verb).unwrap();
        assert_eq!(bytes, (position as u32).to_le_bytes());
    }
    assert!(
        cdr_encoding::from_bytes::<v1::Verb, LittleEndian>(&99u32.to_le_bytes()).is_err(),
        "a verb of a later version"
    );
}

#[test]
fn the_python_dataclasses_are_those_of_the_idl() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/python/muster_v1.py");
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == python_idl::generate(IDL), "{} is not what `cargo xtask python-types` makes", path.display());
}

#[test]
fn debians_idlc_compiles_the_idl() {
    let dir = tempfile::tempdir().unwrap();
    let idl = Path::new(env!("CARGO_MANIFEST_DIR")).join("idl/muster_v1.idl");
    // it writes into the directory it runs in
    match Command::new("idlc").args(["-l", "c"]).arg(&idl).current_dir(dir.path()).output() {
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let header = std::fs::read_to_string(dir.path().join("muster_v1.h")).unwrap();
            for info in topics::ALL {
                let c_name = info.type_name.replace("::", "_");
                assert!(header.contains(&format!("{c_name}_desc")), "{c_name} has no topic descriptor");
            }
        }
        Err(error) => {
            panic!("run idlc (package cyclonedds-tools, installed by `cargo xtask setup`): {error}");
        }
    }
}
