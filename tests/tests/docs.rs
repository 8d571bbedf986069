//! The documentation says what the code says.

use std::fs;

use muster_idl::{Durability, Reliability, topics::ALL};
use muster_tests::source_root;

#[test]
fn the_topic_table_equals_the_code() {
    let text = fs::read_to_string(source_root().join("docs/topics.md")).unwrap();
    let rows: Vec<&str> = text.lines().filter(|l| l.starts_with("| `muster_v1_")).collect();
    assert_eq!(rows.len(), ALL.len(), "docs/topics.md lists every topic once");
    for (row, topic) in rows.iter().zip(ALL) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        assert_eq!(cells[1], format!("`{}`", topic.name));
        assert_eq!(cells[2], format!("`{}`", topic.type_name));
        let reliability = match topic.profile.reliability {
            Reliability::BestEffort => "best effort",
            Reliability::Reliable => "reliable",
        };
        let durability = match topic.profile.durability {
            Durability::Volatile => "volatile",
            Durability::TransientLocal => "transient local",
        };
        let history = match topic.profile.history_depth {
            0 => "keep all".to_string(),
            n => format!("keep last {n}"),
        };
        assert_eq!(&cells[4..7], &[reliability, durability, history.as_str()], "{}", topic.name);
    }
}

#[test]
fn every_verb_is_documented() {
    let text = fs::read_to_string(source_root().join("docs/topics.md")).unwrap();
    for verb in muster_idl::v1::Verb::ALL {
        assert!(text.contains(&format!("`{verb}`")), "docs/topics.md does not explain {verb}");
    }
}
