//! Frames of the file log. Built from the files of the host alone: with wasmtime it would take many minutes.

#![no_main]
#![allow(dead_code)]

#[path = "../../../host/src/log/file/anything.rs"]
mod anything;
#[path = "../../../host/src/log/file/bytes.rs"]
mod bytes;
mod contract;
#[path = "../../../host/src/log/file/disk.rs"]
mod disk;
#[path = "../../../host/src/log/file/entry.rs"]
mod entry;
#[path = "../../../host/src/log/file/frame.rs"]
mod frame;
#[path = "../../../host/src/log/file/scan.rs"]
mod scan;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| anything::read(bytes));
