//! The compiler, and compiled guests on disk, so that a start need not compile.
//!
//! Each file is named for the component and the engine it was made from; one that is damaged in any way is compiled again. Only
//! what has served is kept. A binary without a compiler has `no_compiler` in the place of this.
//!
//! Owns: the files in `DIR/cache`. Must never know: what a component does. A cache that cannot be read or written costs
//! time, never a start.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::Result;
use tracing::{debug, warn};
use wasmtime::Engine;
use wasmtime::component::Component;

use super::compiled;
use super::source::Digest;

/// Files that are kept; those made longest ago go.
const KEPT: usize = 8;

pub struct Compiler {
    cache: Option<PathBuf>,
}

impl Compiler {
    /// `cache` is the directory for what [`keep`](Self::keep) stores.
    pub fn new(cache: Option<&Path>) -> Self {
        Self { cache: cache.map(Path::to_owned) }
    }

    /// Compiles a component, or takes what was made of it before. True when it did the latter.
    pub fn compile(&self, engine: &Engine, bytes: &[u8]) -> Result<(Component, bool)> {
        if let Some(cache) = &self.cache {
            let file = file(cache, engine, &Digest::of(bytes));
            match load(engine, &file) {
                Ok(None) => {}
                Ok(Some(component)) => return Ok((component, true)),
                Err(error) => {
                    warn!("the compiled guest {} is not used, and compiled again: {error:#}", file.display());
                }
            }
        }
        Ok((Component::from_binary(engine, bytes)?, false))
    }

    /// Keeps what was made of a component, until others were made since.
    pub fn keep(&self, engine: &Engine, digest: &Digest, component: &Component) {
        let Some(cache) = &self.cache else { return };
        let kept = compiled::seal(component).and_then(|sealed| write(cache, &file(cache, engine, digest), &sealed));
        if let Err(error) = kept {
            debug!("the compiled guest is not kept in {}: {error:#}", cache.display());
        }
    }
}

fn file(cache: &Path, engine: &Engine, digest: &Digest) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    engine.precompile_compatibility_hash().hash(&mut hasher);
    cache.join(format!("{digest}-{:016x}.cwasm", hasher.finish()))
}

/// None when there is no such file.
fn load(engine: &Engine, file: &Path) -> Result<Option<Component>> {
    match fs::read(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        sealed => compiled::open(engine, &sealed?).map(Some),
    }
}

fn write(cache: &Path, file: &Path, sealed: &[u8]) -> Result<()> {
    fs::create_dir_all(cache)?;
    let unfinished = file.with_extension("new");
    fs::write(&unfinished, sealed)?;
    fs::rename(&unfinished, file)?;
    prune(cache)
}

fn prune(cache: &Path) -> Result<()> {
    let mut files: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(cache)? {
        let entry = entry?;
        files.push((entry.metadata()?.modified()?, entry.path()));
    }
    files.sort();
    for (_, file) in files.iter().rev().skip(KEPT) {
        fs::remove_file(file)?;
    }
    Ok(())
}
