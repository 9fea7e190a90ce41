//! Frames of the transaction log in files.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvs_txlog::fuzz::frames(bytes));
