//! What is in the place of `compiler` in a binary without one: guests come compiled, and nothing is kept.

use std::path::Path;

use anyhow::{Result, bail};
use wasmtime::Engine;
use wasmtime::component::Component;

use super::source::Digest;

pub struct Compiler;

impl Compiler {
    pub fn new(_: Option<&Path>) -> Self {
        Self
    }

    pub fn compile(&self, _: &Engine, _: &[u8]) -> Result<(Component, bool)> {
        bail!("this kvs has no compiler; have `kvs compile` of the full one make a .cwasm file of it, and serve that")
    }

    pub fn keep(&self, _: &Engine, _: &Digest, _: &Component) {}
}
