//! The text that `kvs txlog import` reads.

#![no_main]
#![allow(dead_code)]

#[path = "../../../host/src/log/anything.rs"]
mod anything;
mod contract;
#[path = "../../../host/src/log/text.rs"]
mod text;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| anything::read(bytes));
