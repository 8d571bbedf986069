//! The Python dataclasses of the topics, generated from the .idl: PyPI's own IDL compiler (cyclonedds 11.0.1) crashes.
//!
//! Reads the part of IDL that `idl/idl/*.idl` uses: modules, enums, `@final` structs of primitives, strings,
//! sequences and earlier types, `@key`. Anything else is an error, never skipped.
//!
//! Standard library only: the tests of `idl` include this file for its parser.

use std::fmt::Write;

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Idl {
    /// `["muster", "v1"]`
    pub modules: Vec<String>,
    pub enums: Vec<Enum>,
    pub structs: Vec<Struct>,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Enum {
    pub name: String,
    pub literals: Vec<String>,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Struct {
    pub name: String,
    pub fields: Vec<Field>,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Field {
    pub name: String,
    /// As written: `unsigned long long`, `sequence<Member>`.
    pub kind: String,
    pub key: bool,
}

/// Parses an IDL file.
///
/// # Errors
/// On anything this subset does not have; the text names the line.
pub fn parse(text: &str) -> Result<Idl, String> {
    let mut idl = Idl::default();
    let mut open: Vec<&str> = Vec::new();
    let mut is_final = false;
    for (number, line) in text.lines().enumerate() {
        let wrong = |what: &str| Err(format!("line {}: {what}: {}", number + 1, line.trim()));
        let line_text = line.split("//").next().unwrap_or_default().trim();
        if line_text.is_empty() {
            continue;
        }
        if line_text == "@final" {
            is_final = true;
        } else if let Some(rest) = line_text.strip_suffix('{') {
            match rest.split_whitespace().collect::<Vec<_>>()[..] {
                ["module", name] => {
                    open.push("module");
                    idl.modules.push(name.to_string());
                }
                ["enum", name] => {
                    open.push("enum");
                    idl.enums.push(Enum { name: name.to_string(), literals: Vec::new() });
                }
                ["struct", name] => {
                    if !std::mem::take(&mut is_final) {
                        return wrong("a struct that is not @final");
                    }
                    open.push("struct");
                    idl.structs.push(Struct { name: name.to_string(), fields: Vec::new() });
                }
                _ => return wrong("not a module, enum or struct"),
            }
        } else if line_text == "};" {
            if open.pop().is_none() {
                return wrong("closes nothing");
            }
        } else if open.last() == Some(&"enum") {
            let literal = line_text.trim_end_matches(',');
            if literal.is_empty() || !literal.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
                return wrong("not an enum literal");
            }
            if let Some(last) = idl.enums.last_mut() {
                last.literals.push(literal.to_string());
            }
        } else if open.last() == Some(&"struct") {
            let Some(declaration) = line_text.strip_suffix(';') else { return wrong("a field without its ;") };
            let (key, declaration) = match declaration.strip_prefix("@key ") {
                Some(rest) => (true, rest),
                None => (false, declaration),
            };
            let Some((kind, name)) = declaration.trim().rsplit_once(' ') else { return wrong("not a field") };
            let field = Field { name: name.trim().to_string(), kind: kind.trim().to_string(), key };
            if python_type(&field.kind, &idl).is_none() {
                return wrong("a type this generator does not know");
            }
            if let Some(last) = idl.structs.last_mut() {
                last.fields.push(field);
            }
        } else {
            return wrong("not understood");
        }
    }
    if open.is_empty() { Ok(idl) } else { Err("the file ends inside a declaration".into()) }
}

/// The type in the annotations of a Python dataclass; None for one this subset does not have.
fn python_type(kind: &str, idl: &Idl) -> Option<String> {
    if let Some(element) = kind.strip_prefix("sequence<").and_then(|k| k.strip_suffix('>')) {
        return Some(format!("types.sequence[{}]", python_type(element, idl)?));
    }
    Some(match kind {
        "string" => "str".into(),
        "boolean" => "bool".into(),
        "octet" => "types.uint8".into(),
        "unsigned short" => "types.uint16".into(),
        "unsigned long" => "types.uint32".into(),
        "unsigned long long" => "types.uint64".into(),
        "double" => "types.float64".into(),
        name => {
            let known = idl.enums.iter().any(|e| e.name == name) || idl.structs.iter().any(|s| s.name == name);
            return known.then(|| name.to_string());
        }
    })
}

/// The topic of a keyed type: `PhysicalHost` in `muster::v1` is `muster_v1_physical_host`.
pub fn topic_name(modules: &[String], name: &str) -> String {
    let mut topic = modules.join("_");
    for character in name.chars() {
        if character.is_ascii_uppercase() {
            topic.push('_');
        }
        topic.push(character.to_ascii_lowercase());
    }
    topic
}

/// The Python module.
///
/// # Panics
/// When the IDL is not in the subset that [`parse`] reads: then there is nothing to generate.
pub fn generate(idl: &str) -> String {
    let idl = match parse(idl) {
        Ok(idl) => idl,
        Err(error) => panic!("the IDL cannot be read: {error}"),
    };
    let module = idl.modules.join(".");
    let mut out = String::new();
    // writing to a String cannot fail
    let _ = write!(
        out,
        "# Generated from idl/idl/{}.idl by `cargo xtask python-types`. Do not edit.\n\
         \"\"\"The topics of Muster for the Python binding of Cyclone DDS (`pip install cyclonedds`).\"\"\"\n\n\
         from dataclasses import dataclass\n\n\
         import cyclonedds.idl.annotations as ann\n\
         import cyclonedds.idl.types as types\n\
         from cyclonedds.idl import IdlEnum, IdlStruct\n",
        idl.modules.join("_")
    );
    for Enum { name, literals } in &idl.enums {
        let _ = write!(out, "\n\nclass {name}(IdlEnum, typename=\"{module}.{name}\", default=\"{}\"):\n", literals[0]);
        for (number, literal) in literals.iter().enumerate() {
            let _ = writeln!(out, "    {literal} = {number}");
        }
    }
    for Struct { name, fields } in &idl.structs {
        let _ = write!(out, "\n\n@dataclass\n@ann.final\nclass {name}(IdlStruct, typename=\"{module}.{name}\"):\n");
        for field in fields {
            let kind = python_type(&field.kind, &idl).unwrap_or_default();
            let _ = writeln!(out, "    {}: {kind}", field.name);
            if field.key {
                let _ = writeln!(out, "    ann.key(\"{}\")", field.name);
            }
        }
    }
    let _ = write!(out, "\n\n# Topic name -> type.\nTOPICS = {{\n");
    for Struct { name, .. } in idl.structs.iter().filter(|s| s.fields.iter().any(|f| f.key)) {
        let _ = writeln!(out, "    \"{}\": {name},", topic_name(&idl.modules, name));
    }
    out.push_str("}\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_construct_outside_the_subset_is_an_error() {
        let body = |field: &str| format!("module m {{\n@final\nstruct S {{\n{field}\n}};\n}};\n");
        assert!(parse(&body("@key string a;")).is_ok());
        for bad in ["wstring a;", "string a", "@optional string a;", "long a[3];", "sequence<Other> a;"] {
            assert!(parse(&body(bad)).is_err(), "{bad}");
        }
        assert!(parse("module m {\nstruct S {\n};\n};").is_err(), "not final");
        assert!(parse("module m {").is_err());
    }
}
