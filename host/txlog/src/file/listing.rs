//! The files in the directory of the log by their names, and the segments that make up the log.
//!
//! Must never know: the content of the files. Nothing is changed here: recovery cleans up, and a standby must not.

use std::cmp::Reverse;

use anyhow::{bail, ensure};

use super::segment::{Numbers, SUFFIX};
use super::{Home, identity, mark, position, tail};

/// The files of a log by their names.
pub struct Listing {
    /// The segments, oldest first.
    pub segments: Vec<Numbers>,
    /// Number of the first missing segment.
    missing: Option<u64>,
    /// Segments replaced by a compacted one of `segments`, and not removed yet.
    pub replaced: Vec<Numbers>,
    /// Incomplete files.
    pub temporary: Vec<String>,
    pub strangers: Vec<String>,
}

impl Listing {
    pub fn read(home: &Home) -> anyhow::Result<Self> {
        let (mut found, mut temporary, mut strangers) = (Vec::new(), Vec::new(), Vec::new());
        for name in home.disk.list()? {
            if name.strip_suffix(".tmp").is_some_and(is_ours) {
                temporary.push(name);
            } else if let Some(numbers) = Numbers::parse(&name) {
                found.push(numbers);
            } else if name.ends_with(SUFFIX) {
                bail!(not_a_segment(home, &name));
            } else if !is_ours(&name) {
                strangers.push(name);
            }
        }
        // Of two that begin with the same number, the one that covers more comes first.
        found.sort_by_key(|numbers| (numbers.first, Reverse(numbers.last)));
        let (mut segments, mut replaced, mut missing) = (Vec::<Numbers>::new(), Vec::new(), None);
        for numbers in found {
            let previous = segments.last();
            if previous.is_some_and(|previous| previous.contains(numbers)) {
                replaced.push(numbers);
                continue;
            }
            let expected = previous.map_or(1, |previous| previous.last + 1);
            if numbers.first != expected {
                missing.get_or_insert(expected);
            }
            segments.push(numbers);
        }
        Ok(Self { segments, missing, replaced, temporary, strangers })
    }

    /// Checks that the segments begin with number 1 and have no gaps. A missing one can exist under another name, which is
    /// found when the segments are opened.
    pub fn is_whole(&self, home: &Home) -> anyhow::Result<()> {
        let Some(missing) = self.missing else { return Ok(()) };
        self.is_restored(home)?;
        let missing = Numbers::one(missing).file_name();
        bail!("{} is missing from the log; bring it back, or restore a backup", home.path(&missing).display())
    }

    /// Checks that no restore ended while it renamed its segments, which it does newest first.
    pub fn is_restored(&self, home: &Home) -> anyhow::Result<()> {
        let first = format!("{}.tmp", Numbers::one(1).file_name());
        ensure!(
            self.missing != Some(1) || !self.temporary.contains(&first),
            "a restore into {} was interrupted; remove {} and restore the backup again",
            home.data.display(),
            home.path("").display()
        );
        Ok(())
    }
}

/// Returns whether this is the name of a file of the log, complete or not.
fn is_ours(name: &str) -> bool {
    Numbers::parse(name).is_some()
        || [mark::NAME, identity::NAME, position::NAME].contains(&name)
        || name.ends_with(tail::COPY_SUFFIX)
}

pub fn not_a_segment(home: &Home, name: &str) -> String {
    format!("{} is not a segment of a log; move it away", home.path(name).display())
}
