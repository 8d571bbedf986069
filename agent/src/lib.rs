//! placeholder
#![forbid(unsafe_code)]
pub mod config;
pub mod dispatcher;
pub mod identity;
pub mod ledger;
pub mod presence;
pub mod arguments;
pub mod records;
