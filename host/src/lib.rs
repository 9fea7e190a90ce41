//! A key-value store whose logic is a WebAssembly component.

pub mod contract;
pub mod log;
