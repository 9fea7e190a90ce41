//! The text that `kvs txlog import` reads.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvs_txlog::fuzz::text(bytes));
