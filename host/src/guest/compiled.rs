//! Guests that are compiled already: machine code, behind a mark and a checksum.
//!
//! ```text
//! byte 0           8                           40
//!      "kvscwasm"  SHA-256 of what follows     what wasmtime makes of a component
//! ```
//!
//! Owns: that format, of files an operator makes (`kvs compile`) and of those in the cache. Must never know: who may be
//! trusted with one.

use anyhow::{Context, Result, ensure};
use sha2::{Digest as _, Sha256};
use wasmtime::Engine;
use wasmtime::component::Component;

pub const MARK: &[u8; 8] = b"kvscwasm";
const CHECKSUM_BYTES: usize = 32;

/// The whole file.
pub fn seal(component: &Component) -> Result<Vec<u8>> {
    let code = component.serialize()?;
    Ok([MARK, Sha256::digest(&code).as_slice(), &code].concat())
}

/// The component of a file that is whole and was made for this engine and CPU.
#[expect(unsafe_code)]
pub fn open(engine: &Engine, file: &[u8]) -> Result<Component> {
    let sealed = file.strip_prefix(MARK).and_then(|rest| rest.split_at_checked(CHECKSUM_BYTES));
    let (checksum, code) = sealed.context("it is cut off")?;
    ensure!(checksum == Sha256::digest(code).as_slice(), "its checksum is wrong");
    // SAFETY: this is machine code, which wasmtime trusts to be its own. The checksum rules out damage, and wasmtime checks
    // version, settings and CPU. Who could forge it can write to the data directory, or say which file is the guest, and so
    // owns the store already. Measured: the default guest is ready in a tenth of the time.
    let component = unsafe { Component::deserialize(engine, code) }.map_err(anyhow::Error::from);
    component.context("it was compiled by another version of kvs or for another CPU; compile it again with kvs compile")
}
