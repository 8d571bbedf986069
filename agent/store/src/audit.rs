//! An exact recount of everything that is counted, and what differs.

use std::sync::atomic::Ordering::{Acquire, Relaxed};

use crate::{
    frames::Engine,
    map::{FANOUT, Map},
};

/// An exact recount. With the world stopped.
pub(crate) struct Recount<'a> {
    engine: &'a Engine,
    pub(crate) frames: Vec<u32>,
    pub(crate) nodes: Vec<u32>,
    pub(crate) faults: Vec<String>,
    /// Kept aside for reservations.
    kept: (Vec<u32>, Vec<u32>),
}

impl<'a> Recount<'a> {
    pub(crate) fn new(engine: &'a Engine) -> Self {
        let frames = engine.frames.pool.stats().next as usize;
        let nodes = engine.nodes.pool.stats().next as usize;
        Self { engine, frames: vec![0; frames], nodes: vec![0; nodes], faults: Vec::new(), kept: Default::default() }
    }

    pub(crate) fn fault(&mut self, text: String) {
        if self.faults.len() < 1000 {
            self.faults.push(text);
        }
    }

    pub(crate) fn add(&mut self, map: &Map) {
        let (frames, nodes) = map.account.kept();
        self.kept.0.extend(frames);
        self.kept.1.extend(nodes);
        let frozen = map.freeze();
        if frozen[0].check_open().is_err() {
            return;
        }
        self.visit(map.top(), frozen[0].height + 1);
        for (stripe, tree) in frozen.iter().enumerate() {
            let root = tree.root.load(Relaxed);
            if root != self.engine.nodes.entries(map.top())[stripe].load(Relaxed) {
                self.fault(format!("the top of a map does not name the root of stripe {stripe}"));
            }
            let mapped = if root == 0 { 0 } else { self.engine.count_mapped(root, tree.height) };
            if mapped != tree.mapped {
                self.fault(format!("a tree maps {mapped} blocks and says {}", tree.mapped));
            }
        }
    }

    fn visit(&mut self, node: u32, level: u32) {
        if node == 0 {
            return;
        }
        let Some(seen) = self.nodes.get_mut(node as usize) else {
            return self.fault(format!("a map names node {node}, which was never dealt"));
        };
        *seen += 1;
        if *seen > 1 {
            return;
        }
        for at in 0..FANOUT {
            match self.engine.nodes.entries(node)[at].load(Relaxed) {
                0 => {}
                frame if level == 0 => match self.frames.get_mut(frame as usize) {
                    Some(count) => *count = count.saturating_add(1),
                    None => self.fault(format!("node {node} names frame {frame}, which was never dealt")),
                },
                child => self.visit(child, level - 1),
            }
        }
    }

    /// Compares counts, free lists and index with what was added.
    pub(crate) fn compare(&mut self) {
        let engine = self.engine;
        for frame in 1..self.frames.len() as u32 {
            let (expected, found) = (self.frames[frame as usize], engine.frames.count(frame));
            if expected != found && found < engine.sticky {
                self.fault(format!("frame {frame} counts {found} references, {expected} exist"));
            }
        }
        for node in 1..self.nodes.len() as u32 {
            let (expected, found) = (self.nodes[node as usize], engine.nodes.references(node).load(Acquire));
            if expected != found {
                self.fault(format!("node {node} counts {found} references, {expected} exist"));
            }
        }
        let is_free = |used: &[u32], free: Vec<u32>, kind: &str, count: &dyn Fn(u32) -> u32| {
            let mut faults = Vec::new();
            let mut listed = vec![false; used.len()];
            for number in free {
                if std::mem::replace(&mut listed[number as usize], true) {
                    faults.push(format!("{kind} {number} is free twice"));
                }
            }
            for number in 1..used.len() {
                let in_use = used[number] > 0 || count(number as u32) > 0;
                if in_use == listed[number] {
                    let state = if in_use { "used and free" } else { "neither used nor free" };
                    faults.push(format!("{kind} {number} is {state}"));
                }
            }
            faults
        };
        let free_frames = [engine.frames.pool.free_numbers(), std::mem::take(&mut self.kept.0)].concat();
        let free_nodes = [engine.nodes.pool.free_numbers(), std::mem::take(&mut self.kept.1)].concat();
        let frames = is_free(&self.frames, free_frames, "frame", &|frame| engine.frames.count(frame));
        let nodes = is_free(&self.nodes, free_nodes, "node", &|node| engine.nodes.references(node).load(Acquire));
        for fault in frames.into_iter().chain(nodes) {
            self.fault(fault);
        }
        let mut listed = vec![false; self.frames.len()];
        engine.frames.index.for_each(|tag, frame| {
            if engine.frames.count(frame) == 0 || engine.frames.tag(frame) != tag {
                self.fault(format!("the index lists frame {frame} under {tag:#x}, which does not hold it"));
            } else if std::mem::replace(&mut listed[frame as usize], true) {
                self.fault(format!("the index lists frame {frame} twice"));
            }
        });
    }
}
