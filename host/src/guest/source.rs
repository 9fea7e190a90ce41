//! Where guests come from, and which one serves after a start.
//!
//! Owns: the file in the data directory that remembers a swap, and the one that identifies the serving guest to standbys. Must
//! never know: what is in a component.

use std::fmt::{self, Display};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest as _, Sha256};
use tracing::warn;

use super::compiled;

/// The file of the built-in guest, `guest/default`, which the build of the host makes. For tests, on the same machine.
pub const BUILT_IN_FILE: &str = env!("DEFAULT_GUEST");

/// The built-in guest: a component, or in a release, code that is compiled already.
static BUILT_IN: &[u8] = include_bytes!(env!("DEFAULT_GUEST"));

/// Larger files are no guests. A whole JavaScript engine is 12 MiB.
pub const GUEST_BYTES: u64 = 256 << 20;

/// The guest that was swapped in last, in the data directory.
const REMEMBERED: &str = "guest.wasm";

/// The identity of the guest that the primary serves, in the data directory.
const SERVING: &str = "guest.serving";
/// The most that is read of it.
const SERVING_BYTES: u64 = 128;

static BUILT_IN_DIGEST: LazyLock<Digest> = LazyLock::new(|| Digest::of(BUILT_IN));

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

    /// The guest that the primary on the same data directory serves: the one that is asked for, the one swapped in last, or the
    /// one in the binary. None if it is unknown, or none of these. An error if that cannot be read now.
    pub fn of_primary(asked_for: Option<&Path>, data: &Path) -> Result<Option<Self>> {
        let Some(serving) = recorded(data)? else { return Ok(None) };
        let asked_for = asked_for.map(|file| Self::File(file.to_owned()));
        let candidates = asked_for.into_iter().chain([Self::Remembered(remembered(data)), Self::BuiltIn]);
        let mut unread = None;
        for source in candidates {
            match source.read() {
                Ok(component) if Identity::of(&source, &Digest::of(&component)) == serving => return Ok(Some(source)),
                Ok(_) => {}
                Err(error) if is_missing(&error) => {}
                Err(error) => unread = Some(error.context(format!("cannot read {source}"))),
            }
        }
        if let Some(error) = unread {
            return Err(error);
        }
        warn!("the primary serves {serving}, which is not known here; name the same GUEST.wasm as there");
        Ok(None)
    }

    /// The guest of the process that this one is to replace, if `data` has a record of it. A compiled one may have been compiled
    /// again, for this process.
    pub fn of_former(asked_for: Option<&Path>, data: &Path) -> Result<Self> {
        let chosen = Self::choose(asked_for, data);
        if recorded(data)?.is_none() {
            return Ok(chosen);
        }
        if let Some(found) = Self::of_primary(asked_for, data)? {
            return Ok(found);
        }
        ensure!(
            chosen.read().is_ok_and(|file| file.starts_with(compiled::MARK)),
            "the server that is to be upgraded serves a guest that is not on disk any more: neither as the file that was named at \
             its start nor in {}; swap to the one that is to serve, or restart the server",
            data.display()
        );
        Ok(chosen)
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

fn is_missing(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// The file in which a data directory remembers the guest that was swapped in last.
pub fn remembered(data: &Path) -> PathBuf {
    data.join(REMEMBERED)
}

/// Lets the next start serve this component; without one, the default guest.
pub fn remember(data: &Path, component: Option<&[u8]>) -> Result<()> {
    let file = remembered(data);
    let change = || match component {
        Some(bytes) => replace(&file, bytes),
        None => fs::remove_file(&file).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        }),
    };
    // The name is certain only when the directory is on disk too.
    change().and_then(|()| File::open(data)?.sync_all()).with_context(|| format!("cannot change {}", file.display()))
}

/// Replaces the content of a file. Its name is durable when the directory is synced.
fn replace(file: &Path, bytes: &[u8]) -> io::Result<()> {
    let unfinished = file.with_added_extension("new");
    let mut writing = File::create(&unfinished)?;
    writing.write_all(bytes)?;
    writing.sync_all()?;
    fs::rename(&unfinished, file)
}

/// Identity of a guest to other processes. The built-in ones of all versions are the same, so that one server of a pair can be
/// upgraded after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity(Option<String>);

impl Identity {
    pub fn of(source: &Source, digest: &Digest) -> Self {
        let is_built_in = *source == Source::BuiltIn || *digest == *BUILT_IN_DIGEST;
        Self((!is_built_in).then(|| digest.to_string()))
    }
}

impl Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self(None) => f.write_str("the built-in guest"),
            Self(Some(digest)) => write!(f, "the guest with SHA-256 {digest}"),
        }
    }
}

/// Records the guest that this process serves as the primary. Only standbys need it, so a failure is logged.
pub fn record(data: &Path, Identity(digest): &Identity) {
    if recorded(data).is_ok_and(|recorded| recorded.is_some_and(|recorded| recorded.0 == *digest)) {
        return;
    }
    let line = format!("{}\n", digest.as_deref().unwrap_or_default());
    if let Err(error) = replace(&data.join(SERVING), line.as_bytes()) {
        // Rather none than that of another guest.
        let _ = fs::remove_file(data.join(SERVING));
        warn!("cannot record for standbys which guest serves: {}: {error}", data.join(SERVING).display());
    }
}

/// The guest that the primary recorded. None where there is no record, as of an older version.
pub fn recorded(data: &Path) -> Result<Option<Identity>> {
    let (file, mut line) = (data.join(SERVING), String::new());
    match File::open(&file).and_then(|file| file.take(SERVING_BYTES).read_to_string(&mut line)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read.with_context(|| format!("cannot read {}", file.display()))?,
    };
    let Some(digest) = line.strip_suffix('\n') else { return Ok(None) };
    Ok(Some(Identity((!digest.is_empty()).then(|| digest.to_owned()))))
}

/// The files that decide which guest a standby serves.
pub fn of_primary(asked_for: Option<&Path>, data: &Path) -> Vec<PathBuf> {
    asked_for.map(Path::to_owned).into_iter().chain([remembered(data), data.join(SERVING)]).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_that_cannot_be_read_is_not_missing() {
        let data = tempfile::tempdir().unwrap();
        assert_eq!(recorded(data.path()).unwrap(), None);
        assert_eq!(Source::of_primary(None, data.path()).unwrap(), None);
        // As of an input/output error: it can be opened, and not read.
        fs::create_dir(data.path().join(SERVING)).unwrap();
        assert!(recorded(data.path()).is_err());
        assert!(Source::of_primary(None, data.path()).is_err());
    }

    #[test]
    fn guest_that_cannot_be_read_is_not_unknown() {
        let data = tempfile::tempdir().unwrap();
        let identity = |component: &[u8]| Identity::of(&Source::Sent, &Digest::of(component));
        record(data.path(), &identity(b"a guest"));
        assert_eq!(Source::of_primary(None, data.path()).unwrap(), None);
        fs::create_dir(remembered(data.path())).unwrap();
        assert!(Source::of_primary(None, data.path()).unwrap_err().to_string().contains("guest.wasm"));
        // What is served was found all the same.
        record(data.path(), &identity(BUILT_IN));
        assert_eq!(Source::of_primary(None, data.path()).unwrap(), Some(Source::BuiltIn));
        fs::remove_dir(remembered(data.path())).unwrap();
        remember(data.path(), Some(b"a guest")).unwrap();
        record(data.path(), &identity(b"a guest"));
        let found = Source::of_primary(None, data.path()).unwrap();
        assert_eq!(found, Some(Source::Remembered(remembered(data.path()))));
    }
}
