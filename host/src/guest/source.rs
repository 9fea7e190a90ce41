//! Where guests come from, and which one serves after a start.
//!
//! Owns: the file in the data directory that remembers a swap. Must never know: what is in a component.

use std::fmt::{self, Display};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

/// The file of the built-in guest, `guest/default`, which the build of the host makes. For tests, on the same machine.
pub const BUILT_IN_FILE: &str = env!("DEFAULT_GUEST");

/// The built-in guest: a component, or in a release, code that is compiled already.
static BUILT_IN: &[u8] = include_bytes!(env!("DEFAULT_GUEST"));

/// Larger files are no guests. A whole JavaScript engine is 12 MiB.
pub const GUEST_BYTES: u64 = 256 << 20;

/// The guest that was swapped in last, in the data directory.
const REMEMBERED: &str = "guest.wasm";

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    BuiltIn,
    File(PathBuf),
    /// It was swapped in during an earlier run.
    Remembered(PathBuf),
    /// It came over the admin listener.
    Sent,
}

impl Source {
    /// The guest to start with: the one that is asked for, the one swapped in last, the one in the binary.
    pub fn choose(asked_for: Option<&Path>, data: &Path) -> Self {
        let remembered = remembered(data);
        match asked_for {
            Some(file) => Self::File(file.to_owned()),
            None if remembered.exists() => Self::Remembered(remembered),
            None => Self::BuiltIn,
        }
    }

    /// The component.
    pub fn read(&self) -> Result<Vec<u8>> {
        match self {
            Self::BuiltIn => Ok(BUILT_IN.to_vec()),
            Self::File(file) | Self::Remembered(file) => read(file),
            Self::Sent => bail!("it was sent by a client and is not on disk any more"),
        }
    }

    /// What goes before the reason when it cannot be run.
    pub fn cannot_be_run(&self) -> String {
        match self {
            Self::BuiltIn => "the default guest cannot be run".to_owned(),
            Self::File(file) => format!("{} cannot be run as a guest", file.display()),
            Self::Remembered(file) => format!(
                "{}, the guest swapped in last, cannot be run; name another to serve, or remove it for the default one",
                file.display()
            ),
            Self::Sent => "it cannot be run as a guest".to_owned(),
        }
    }
}

impl Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BuiltIn => f.write_str("built in"),
            Self::File(file) | Self::Remembered(file) => file.display().fmt(f),
            Self::Sent => f.write_str("sent"),
        }
    }
}

/// Reads what may be a guest.
pub fn read(file: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(file)?.take(GUEST_BYTES + 1).read_to_end(&mut bytes)?;
    ensure!(bytes.len() as u64 <= GUEST_BYTES, "it is larger than {GUEST_BYTES} bytes");
    Ok(bytes)
}

/// The file in which a data directory remembers the guest that was swapped in last.
pub fn remembered(data: &Path) -> PathBuf {
    data.join(REMEMBERED)
}

/// Lets the next start serve this component; without one, the default guest.
pub fn remember(data: &Path, component: Option<&[u8]>) -> Result<()> {
    let (file, unfinished) = (remembered(data), data.join("guest.wasm.new"));
    let change = || match component {
        Some(bytes) => {
            let mut writing = File::create(&unfinished)?;
            writing.write_all(bytes)?;
            writing.sync_all()?;
            fs::rename(&unfinished, &file)
        }
        None => fs::remove_file(&file).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        }),
    };
    // The name is certain only when the directory is on disk too.
    change().and_then(|()| File::open(data)?.sync_all()).with_context(|| format!("cannot change {}", file.display()))
}

/// Identity of a component: the SHA-256 of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest([u8; 32]);

impl Digest {
    pub fn of(component: &[u8]) -> Self {
        Self(Sha256::digest(component).into())
    }
}

impl Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
