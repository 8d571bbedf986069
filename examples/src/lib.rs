//! Small programs that use Muster from outside; each is in `src/bin/` (Rust) or `python/`.
//!
//! | program | what it shows |
//! |---|---|
//! | `src/bin/subscribe.rs` | reading host and VM topics in Rust |
//! | `python/subscribe.py` | the same with another vendor's DDS (Cyclone) |
//! | `python/command.py` | one published command, a verdict from each VM |
//! | `python/count_commands.py` | counting the samples on the command topic |
//! | `python/muster_v1.py` | the topics as Python dataclasses, generated from the IDL |
//! | `config/*.toml` | configuration files with every key explained |
#![forbid(unsafe_code)]
