//! What a power cut leaves of what was done to a disk.
//!
//! The fault model:
//!
//! - What was written before a sync of the file that returned is there; so is what was done to names before a sync of
//!   the directory that returned.
//! - Of what was written to a file since, each part that lies in one sector of 512 bytes is, apart from all others, what
//!   it was, what was written, zeros or garbage. Garbage is random, one byte over and over, or other bytes of the same
//!   file. Bytes of a sector that were not written to stay what they were.
//! - A change of a file's size since is there or not. What was written beyond the end of the file is lost.
//! - Each file made, renamed or removed since is there under the old name, the new, both, or none: each operation on
//!   names was done or not, apart from all others; one rename is done wholly or not at all.
//! - Of what a sync that failed was to make certain, each sector is what it was or what was written. No later sync makes
//!   more of it certain, although what is read is what was written, until that is dropped from memory.
//! - Nothing else ever changes.

use std::collections::BTreeMap;
use std::sync::Arc;

use fastrand::Rng;

use super::FakeDisk;
use super::disk::{Operation, name, write};
use crate::file::position;

const SECTOR: usize = 512;

/// What is certain of a disk, and what is not yet.
pub struct Surface {
    names: BTreeMap<String, usize>,
    files: Vec<Arc<Vec<u8>>>,
    pending_names: Vec<Operation>,
    pending: BTreeMap<usize, Vec<Operation>>,
    number: u64,
}

impl Surface {
    pub fn new(disk: &FakeDisk) -> Self {
        let (names, files) = disk.content();
        Self { names, files, pending_names: Vec::new(), pending: BTreeMap::new(), number: disk.number() }
    }

    pub fn apply(&mut self, operation: &Operation) {
        match operation {
            Operation::Write { file, .. } | Operation::Resize { file, .. } => {
                self.pending.entry(*file).or_default().push(operation.clone());
            }
            Operation::Sync { file } => {
                for done in self.pending.remove(file).unwrap_or_default() {
                    match done {
                        Operation::Write { offset, bytes, .. } => write(self.file(*file), offset, &bytes),
                        Operation::Resize { size, .. } => Arc::make_mut(self.file(*file)).resize(size, 0),
                        _ => {}
                    }
                }
            }
            Operation::Copied => self.number += 1,
            Operation::Lost { file, left } => {
                self.pending.remove(file);
                *self.file(*file) = left.clone();
            }
            Operation::SyncNames => {
                for done in self.pending_names.drain(..) {
                    name(&mut self.names, &done);
                }
            }
            Operation::Create { .. } | Operation::Rename { .. } | Operation::Remove { .. } => {
                self.pending_names.push(operation.clone());
            }
        }
    }

    fn file(&mut self, file: usize) -> &mut Arc<Vec<u8>> {
        // Made since: empty, and without a name unless that was made certain too.
        if self.files.len() <= file {
            self.files.resize(file + 1, Arc::default());
        }
        &mut self.files[file]
    }

    /// Whether there is nothing to lose.
    pub fn is_certain(&self) -> bool {
        // The position is never made certain, and nothing rests on it.
        let position = self.names.get(position::NAME);
        self.pending_names.is_empty() && self.pending.keys().all(|file| Some(file) == position)
    }

    /// One of the disks that a power cut can leave now.
    pub fn after_power_cut(&self, dice: &mut Rng) -> FakeDisk {
        // How much of what is not certain was done: all, nothing, nearly all, half, hardly any.
        let done = [1.0, 0.0, 0.95, 0.5, 0.1][dice.usize(0..5)];
        let mut names = self.names.clone();
        for operation in &self.pending_names {
            if dice.f64() < done {
                name(&mut names, operation);
            }
        }
        let mut files = self.files.clone();
        let made = names.values().max().map_or(0, |file| file + 1);
        files.resize(made.max(files.len()), Arc::default());
        for file in names.values() {
            for operation in self.pending.get(file).into_iter().flatten() {
                let content = &mut files[*file];
                match operation {
                    Operation::Resize { size, .. } if dice.f64() < done => Arc::make_mut(content).resize(*size, 0),
                    Operation::Write { offset, bytes, .. } => {
                        damage(Arc::make_mut(content).as_mut_slice(), *offset, bytes, done, dice);
                    }
                    _ => {}
                }
            }
        }
        FakeDisk::new(names, files, self.number)
    }
}

/// Writes each sector, or not, or something else.
fn damage(content: &mut [u8], offset: usize, bytes: &[u8], done: f64, dice: &mut Rng) {
    let mut at = offset;
    let end = (offset + bytes.len()).min(content.len());
    while at < end {
        let to = (at / SECTOR + 1).saturating_mul(SECTOR).min(end);
        if dice.f64() < done {
            content[at..to].copy_from_slice(&bytes[at - offset..to - offset]);
        } else {
            match dice.u8(0..6) {
                0 | 1 => {}
                2 => content[at..to].fill(0),
                3 => dice.fill(&mut content[at..to]),
                4 => content[at..to].fill(dice.u8(..)),
                _ => {
                    let from = dice.usize(0..=(content.len() - (to - at)) / SECTOR) * SECTOR + at % SECTOR;
                    let from = from.min(content.len() - (to - at));
                    content.copy_within(from..from + to - at, at);
                }
            }
        }
        at = to;
    }
}
