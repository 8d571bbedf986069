//! Which crate of ours may name which: the arrows of docs/architecture.md as a table, checked over `cargo metadata`.
//!
//! A new edge is a reviewed change to this table. Third-party doors (who may name rustdds, virt, …) are in deny.toml.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// Crate, and the crates it may name. Everything but idl and xtask may name muster-common as well.
const EDGES: &[(&str, &[&str])] = &[
    // 0: words
    ("muster-idl", &[]),
    ("muster-common", &[]),
    // 1: parts that know nothing of each other
    ("muster-cim", &["muster-idl"]),
    ("muster-select", &["muster-cim"]),
    ("muster-bus", &["muster-idl"]),
    ("muster-repository", &[]),
    ("muster-block", &[]),
    ("muster-journal", &[]),
    ("muster-virt", &[]),
    ("muster-api", &[]),
    // 2: parts made of parts
    ("muster-store", &["muster-block", "muster-journal"]),
    ("muster-export", &["muster-block"]),
    ("muster-backup", &["muster-block", "muster-store", "muster-journal", "muster-repository"]),
    ("muster-fleet", &["muster-cim", "muster-select", "muster-idl"]),
    // 3: programs
    (
        "muster-agent",
        &[
            "muster-cim",
            "muster-select",
            "muster-bus",
            "muster-virt",
            "muster-store",
            "muster-journal",
            "muster-export",
            "muster-backup",
            "muster-block",
            "muster-idl",
            "muster-repository",
        ],
    ),
    (
        "muster-controller",
        &["muster-fleet", "muster-select", "muster-api", "muster-bus", "muster-cim", "muster-idl", "muster-repository"],
    ),
    ("muster", &["muster-api"]),
    // beside the house: names nothing of ours, so that it compiles before anything is installed
    ("xtask", &[]),
];

/// What the tests and benches of a crate may name beyond that.
const TEST_EDGES: &[(&str, &[&str])] = &[
    // the NBD benches and rounds against the real store
    ("muster-export", &["muster-store"]),
];

/// May name anything; nothing may name them.
const TOP: &[&str] = &["muster-tests", "muster-examples"];

/// Compile without tokio: the data plane is synchronous code on named threads.
const SYNCHRONOUS: &[&str] = &["muster-block", "muster-store", "muster-journal", "muster-export"];

/// Layer of each crate: an edge must go down. Keeps the table itself honest.
fn layer(name: &str) -> usize {
    match name {
        "muster-idl" | "muster-common" => 0,
        "muster-cim" | "muster-bus" | "muster-repository" | "muster-block" | "muster-journal" | "muster-virt"
        | "muster-api" => 1,
        // select reads cim properties: between 1 and 2, but below whatever names it
        "muster-select" | "muster-store" | "muster-export" => 2,
        "muster-backup" | "muster-fleet" => 3,
        "muster-agent" | "muster-controller" | "muster" => 4,
        "xtask" => 0,
        other => panic!("{other} has no layer: add it to tests/tests/layering.rs"),
    }
}

/// Name of each workspace crate, with the names of what it depends on, and whether only its tests do.
fn workspace() -> BTreeMap<String, BTreeSet<(String, bool)>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("start cargo");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
    let name = |value: &serde_json::Value| value["name"].as_str().expect("a name").to_owned();
    metadata["packages"]
        .as_array()
        .expect("packages")
        .iter()
        .map(|package| {
            let dependencies = package["dependencies"].as_array().expect("dependencies");
            let edge = |value: &serde_json::Value| (name(value), value["kind"] == "dev");
            (name(package), dependencies.iter().map(edge).collect())
        })
        .collect()
}

#[test]
fn every_crate_names_only_what_its_layer_may() {
    let workspace = workspace();
    let mut wrong = Vec::new();
    for (package, dependencies) in &workspace {
        let ours = dependencies.iter().filter(|(name, _)| workspace.contains_key(name));
        // a crate's tests may name the crate itself, with other features
        for (dependency, for_tests) in ours.filter(|(name, _)| name != package) {
            if TOP.contains(&dependency.as_str()) {
                wrong.push(format!("{package} -> {dependency}: nothing may name it"));
                continue;
            }
            if TOP.contains(&package.as_str()) {
                continue;
            }
            let Some((_, allowed)) = EDGES.iter().find(|(name, _)| name == package) else {
                wrong.push(format!("{package}: not in the table"));
                continue;
            };
            let common = dependency == "muster-common" && package != "muster-idl" && package != "xtask";
            let test_edge =
                |(name, allowed): &(&str, &[&str])| name == package && allowed.contains(&dependency.as_str());
            let only_tests = *for_tests && TEST_EDGES.iter().any(test_edge);
            if !common && !only_tests && !allowed.contains(&dependency.as_str()) {
                wrong.push(format!("{package} -> {dependency}: not in the table"));
            }
        }
    }
    assert!(wrong.is_empty(), "forbidden edges:\n  {}", wrong.join("\n  "));
}

#[test]
fn the_table_itself_goes_only_down() {
    for (package, allowed) in EDGES {
        for dependency in *allowed {
            assert!(layer(dependency) < layer(package), "{package} -> {dependency} does not go down");
        }
    }
}

#[test]
fn every_crate_of_the_workspace_is_in_the_table() {
    let known: BTreeSet<&str> = EDGES.iter().map(|(name, _)| *name).chain(TOP.iter().copied()).collect();
    for package in workspace().keys() {
        assert!(known.contains(package.as_str()), "{package} is not in the table");
    }
}

#[test]
fn the_data_plane_does_not_depend_on_tokio() {
    let workspace = workspace();
    for package in SYNCHRONOUS {
        if let Some(dependencies) = workspace.get(*package) {
            assert!(!dependencies.contains(&("tokio".to_owned(), false)), "{package} depends on tokio");
        }
    }
}
