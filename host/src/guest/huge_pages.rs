//! Huge pages for the memory of guests.
//!
//! Linear memory grows by 64 KiB, so that the kernel gives it pages of 4 KiB, and joins them later at a few MB a second, if it is
//! set to do so at all. With gigabytes of data a request then waits for the processor to find its pages, and to free the memory
//! takes tenths of a second: of an instance that trapped, in which the process can map nothing, and of a server that was
//! killed, whose lock a standby waits for.
//!
//! Owns: which memory is joined, and when. Must never know: what is in it.

use std::ffi::c_void;
use std::ops::Range;
use std::sync::Weak;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use std::{fs, io};

use kvs_runtime::Env;
use tracing::debug;

const PAUSE: Duration = Duration::from_secs(1);
const HUGE_PAGE: usize = 2 << 20;
/// wasmtime reserves 4 GiB for each memory, of which the part beyond its end is inaccessible. Nothing else in the process is like
/// that.
const RESERVED: usize = 3 << 30;
/// The C libraries do not all have it.
const MADV_COLLAPSE: i32 = 25;
/// The setting of the system. `never` is respected, though the kernel would not.
const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// Joins pages from time to time, in a thread of its own, while memory grows. `total` counts the bytes of all instances.
pub fn join(total: Weak<AtomicU64>, env: &Env) -> io::Result<()> {
    let setting = fs::read_to_string(SETTING).unwrap_or_default();
    if setting.is_empty() || setting.contains("[never]") {
        return Ok(());
    }
    let clock = env.clock.clone();
    let mut joined = 0;
    let join = move || {
        while let Some(total) = total.upgrade() {
            let held = total.load(Ordering::Relaxed);
            drop(total);
            if held != joined {
                let maps = fs::read_to_string("/proc/self/maps")?;
                memories(&maps).into_iter().for_each(collapse);
                joined = held;
            }
            clock.pause(PAUSE);
        }
        Ok(())
    };
    env.tasks.restart_thread("huge pages", &env.clock, join).map(drop)
}

/// Returns the accessible part of each linear memory in `/proc/self/maps`, without what its component initialized, in whole huge
/// pages.
fn memories(maps: &str) -> Vec<Range<usize>> {
    let mappings: Vec<_> = maps.lines().filter_map(Mapping::parse).collect();
    let pairs = mappings.iter().zip(mappings.iter().skip(1));
    let memories = pairs.filter(|(used, reserved)| {
        let is_one = used.addresses.end == reserved.addresses.start;
        let size = reserved.addresses.end - used.addresses.start;
        is_one && size >= RESERVED && used.is_anonymous("rw-p") && reserved.is_anonymous("---p")
    });
    let whole = memories.map(|(used, _)| {
        let Range { start, end } = used.addresses;
        start.next_multiple_of(HUGE_PAGE)..end / HUGE_PAGE * HUGE_PAGE
    });
    whole.filter(|pages| !pages.is_empty()).collect()
}

struct Mapping<'m> {
    addresses: Range<usize>,
    permissions: &'m str,
    /// Offset, device, inode and path of a file.
    file: [&'m str; 4],
}

impl<'m> Mapping<'m> {
    fn parse(line: &'m str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let address = |text| usize::from_str_radix(text, 16).ok();
        let addresses = address(start)?..address(end)?;
        let permissions = fields.next()?;
        let file = [fields.next()?, fields.next()?, fields.next()?, fields.next().unwrap_or_default()];
        Some(Self { addresses, permissions, file })
    }

    fn is_anonymous(&self, permissions: &str) -> bool {
        self.permissions == permissions && self.file[2..] == ["0", ""]
    }
}

/// Joins the pages of this memory. Pages that cannot be joined now stay as they are.
#[expect(unsafe_code)]
fn collapse(pages: Range<usize>) {
    let address = std::ptr::without_provenance_mut::<c_void>(pages.start);
    // SAFETY: the contents of memory and what may be done with it stay as they are, whatever is mapped there by now. Measured:
    // with ten million keys a standby serves in half the time after the server was killed.
    let joined = unsafe { libc::madvise(address, pages.len(), MADV_COLLAPSE) };
    if joined != 0 {
        debug!("pages of guests are not all huge: {}", io::Error::last_os_error());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn finds_the_accessible_part_of_linear_memories() {
        let maps = "\
            55f000000000-55f040000000 rw-p 00000000 00:00 0                          [heap]\n\
            7f0000000000-7f0000200000 rw-p 00000000 00:01 2051                       /memfd:wasm-memory-image (deleted)\n\
            7f0000200000-7f0001010000 rw-p 00000000 00:00 0 \n\
            7f0001010000-7f0102000000 ---p 00000000 00:00 0 \n\
            7f0200000000-7f0240000000 rw-p 00000000 00:00 0 \n\
            7f0240000000-7f0240001000 ---p 00000000 00:00 0 \n\
            7f0300000000-7f0300010000 rw-p 00000000 00:00 0 \n\
            7f0300010000-7f0402000000 ---p 00000000 00:00 0 \n";
        let start = 0x7f00_0020_0000;
        let found = memories(maps);
        assert_eq!((found.len(), found[0].clone()), (1, start..start + 14 * MIB));
    }

    #[test]
    fn what_it_cannot_read_is_no_memory() {
        for line in ["", "x", "1-2", "1-2 rw-p 0 0", "g-h rw-p 0 00:00 0"] {
            assert!(Mapping::parse(line).is_none(), "{line}");
        }
    }
}
