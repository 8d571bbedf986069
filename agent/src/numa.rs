//! Where the machine's memory is, and on which of its NUMA nodes the store's lies, as the kernel counts it.
//!
//! A machine without nodes has one. A store that ends with the process is private memory, which cannot be told from other
//! memory of ours: then only the nodes' sizes are known.

use std::{collections::BTreeMap, path::Path};

use muster_common::ByteLen;
use serde::Serialize;

/// One node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Node {
    pub node: u32,
    pub memory_bytes: u64,
    /// What the store has there.
    pub store_bytes: Option<u64>,
}

/// The nodes and their sizes.
pub fn nodes() -> Vec<Node> {
    let listed = std::fs::read_dir("/sys/devices/system/node").into_iter().flatten().flatten();
    let mut nodes: Vec<Node> = listed
        .filter_map(|entry| {
            let node = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
            let memory_bytes = total(&std::fs::read_to_string(entry.path().join("meminfo")).ok()?)?;
            Some(Node { node, memory_bytes, store_bytes: None })
        })
        .collect();
    nodes.sort_by_key(|node| node.node);
    if nodes.is_empty() {
        let memory = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text));
        nodes.extend(memory.map(|memory_bytes| Node { node: 0, memory_bytes, store_bytes: None }));
    }
    nodes
}

/// For the log.
pub fn sizes() -> Vec<String> {
    nodes().iter().map(|node| format!("node {}: {}", node.node, ByteLen(node.memory_bytes))).collect()
}

/// The same with what the store that lies in `directory` has on each. Takes a while: the kernel looks at every page.
pub fn nodes_of(directory: &Path) -> Vec<Node> {
    let mut nodes = nodes();
    if let Ok(maps) = std::fs::read_to_string("/proc/self/numa_maps") {
        let there = bytes_below(&maps, directory);
        for node in &mut nodes {
            node.store_bytes = Some(there.get(&node.node).copied().unwrap_or(0));
        }
    }
    nodes
}

/// `Node 0 MemTotal: 24684084 kB`, or without the node.
fn total(meminfo: &str) -> Option<u64> {
    let (_, rest) = meminfo.split_once("MemTotal:")?;
    let kilobytes: u64 = rest.split_whitespace().next()?.parse().ok()?;
    kilobytes.checked_mul(1024)
}

/// Bytes of files below a directory on each node (`/proc/pid/numa_maps`, numa(7)).
fn bytes_below(maps: &str, directory: &Path) -> BTreeMap<u32, u64> {
    let mut found = BTreeMap::new();
    for line in maps.lines() {
        let value = |key: &str| line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        if !value("file").is_some_and(|file| Path::new(file).starts_with(directory)) {
            continue;
        }
        let page = value("kernelpagesize_kB").and_then(|size| size.parse::<u64>().ok()).unwrap_or(4) * 1024;
        for word in line.split_whitespace() {
            let on = word.strip_prefix('N').and_then(|word| word.split_once('='));
            if let Some((Ok(node), Ok(pages))) = on.map(|(node, pages)| (node.parse::<u32>(), pages.parse::<u64>())) {
                *found.entry(node).or_default() += pages.saturating_mul(page);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_memory_on_some_node() {
        assert!(nodes().iter().any(|node| node.memory_bytes > 0 && node.store_bytes.is_none()));
    }

    #[test]
    fn what_the_store_has_is_counted_by_node_in_its_page_size() {
        let maps = "7f00 default file=/run/m/store/frames huge dirty=3 N0=2 N1=1 kernelpagesize_kB=2048\n\
                    7f10 default file=/run/m/store/words mapped=5 N1=5 kernelpagesize_kB=4\n\
                    7f20 default file=/run/m/store-2/frames N0=9 kernelpagesize_kB=4\n\
                    7f30 default anon=7 dirty=7 N0=7 kernelpagesize_kB=4\n";
        let found = bytes_below(maps, Path::new("/run/m/store"));
        assert_eq!(found, BTreeMap::from([(0, 2 * 2048 * 1024), (1, 2048 * 1024 + 5 * 4096)]));
        assert_eq!(total("Node 0 MemTotal:       24684084 kB\nNode 0 MemFree: 1 kB"), Some(24_684_084 << 10));
        assert_eq!(total("nothing"), None);
    }
}
