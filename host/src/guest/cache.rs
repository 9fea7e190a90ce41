//! Compiled guests on disk, so that a start need not compile.
//!
//! Each file is named for the component and the engine it was made from, and begins with the checksum of what follows: a
//! compiled guest is machine code, and one that is damaged in any way is compiled anew. Only what has served is kept.
//!
//! Owns: the files in `DIR/cache`. Must never know: what a component does. A cache that cannot be read or written costs
//! time, never a start.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Result, ensure};
use sha2::{Digest as _, Sha256};
use tracing::{debug, warn};
use wasmtime::Engine;
use wasmtime::component::Component;

use super::source::Digest;

/// Files that are kept; those made longest ago go.
const KEPT: usize = 8;
const CHECKSUM_BYTES: usize = 32;

pub struct Cache {
    directory: PathBuf,
}

impl Cache {
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// What was made of the component before, when it is there whole.
    pub fn load(&self, engine: &Engine, digest: &Digest) -> Option<Component> {
        let file = self.file(engine, digest);
        load(engine, &file).unwrap_or_else(|error| {
            warn!("the compiled guest {} is not used, and made anew: {error:#}", file.display());
            None
        })
    }

    /// Keeps what was made of a component, until others were made since.
    pub fn keep(&self, engine: &Engine, digest: &Digest, component: &Component) {
        let file = self.file(engine, digest);
        let kept = component.serialize().map_err(anyhow::Error::from).and_then(|code| self.write(&file, &code));
        if let Err(error) = kept {
            debug!("the compiled guest is not kept in {}: {error:#}", file.display());
        }
    }

    fn file(&self, engine: &Engine, digest: &Digest) -> PathBuf {
        let mut hasher = DefaultHasher::new();
        engine.precompile_compatibility_hash().hash(&mut hasher);
        self.directory.join(format!("{digest}-{:016x}.cwasm", hasher.finish()))
    }

    fn write(&self, file: &Path, code: &[u8]) -> Result<()> {
        fs::create_dir_all(&self.directory)?;
        let unfinished = file.with_extension("new");
        let checksum: [u8; CHECKSUM_BYTES] = Sha256::digest(code).into();
        fs::write(&unfinished, [&checksum, code].concat())?;
        fs::rename(&unfinished, file)?;
        self.prune()
    }

    fn prune(&self) -> Result<()> {
        let mut files: Vec<(SystemTime, PathBuf)> = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            files.push((entry.metadata()?.modified()?, entry.path()));
        }
        files.sort();
        for (_, file) in files.iter().rev().skip(KEPT) {
            fs::remove_file(file)?;
        }
        Ok(())
    }
}

/// None when there is no such file.
#[expect(unsafe_code)]
fn load(engine: &Engine, file: &Path) -> Result<Option<Component>> {
    let bytes = match fs::read(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        bytes => bytes?,
    };
    let (checksum, code) = bytes.split_at_checked(CHECKSUM_BYTES).unwrap_or((&[], &bytes));
    ensure!(checksum == Sha256::digest(code).as_slice(), "its checksum is wrong");
    // SAFETY: this is machine code, which wasmtime trusts to be its own. The checksum rules out damage, the name another
    // engine or component (wasmtime checks its version and settings once more). Who could forge both can write to the
    // data directory, and so owns the store already. Measured: the default guest is ready in a tenth of the time.
    let component = unsafe { Component::deserialize(engine, code) }?;
    Ok(Some(component))
}
