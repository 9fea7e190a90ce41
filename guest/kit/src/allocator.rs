//! An allocator that keeps a few freed pieces of each small size at hand.
//!
//! A request and its answer are some thirty short texts, allocated and freed again within one call. The allocator of the
//! sandbox's C library, which is made to waste no room, takes a hundred instructions and more for each; a piece that is kept
//! here is taken again in ten. What is kept is bounded, so that room which was freed is there for whatever comes next.
//!
//! Must never know: what is allocated. For guests, as their `#[global_allocator]`: they have one thread.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::Cell;
use std::ptr;

/// How many sizes are kept: the smallest, and each with a step more than the one before. The library cuts its memory in
/// steps of 16 bytes, of which it needs 4, so that nothing is wasted.
const SIZES: usize = 16;
const SMALLEST: usize = 12;
const STEP: usize = 16;
const LARGEST: usize = SMALLEST + (SIZES - 1) * STEP;
/// What the pieces are aligned to.
const ALIGN: usize = 8;
/// Pieces kept of each size.
const KEPT: u8 = 16;

pub struct Allocator<A> {
    /// Where pieces come from, and what is not kept goes to.
    system: A,
    sizes: [Kept; SIZES],
}

/// Pieces of one size: the first, which begins with where the next is.
struct Kept {
    first: Cell<*mut u8>,
    count: Cell<u8>,
}

// SAFETY: a guest has one thread.
#[cfg(target_arch = "wasm32")]
unsafe impl<A> Sync for Allocator<A> {}

impl<A> Allocator<A> {
    pub const fn new(system: A) -> Self {
        Self { system, sizes: [const { Kept { first: Cell::new(ptr::null_mut()), count: Cell::new(0) } }; SIZES] }
    }
}

/// Which of the sizes is enough, if one is.
fn size_for(layout: Layout) -> Option<usize> {
    let is_kept = layout.size() <= LARGEST && layout.align() <= ALIGN;
    is_kept.then(|| (layout.size() + STEP - SMALLEST - 1) / STEP)
}

/// What is asked of the system for a piece of this size.
const fn piece(size: usize) -> Layout {
    match Layout::from_size_align(SMALLEST + size * STEP, ALIGN) {
        Ok(layout) => layout,
        Err(_) => unreachable!(),
    }
}

// SAFETY: a piece is at least as large and as aligned as what it is given for, comes from the system by the layout that it goes
// back with, and is either kept or given out. While it is kept, its first bytes, which nobody else has, are the link to the next.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Allocator<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(size) = size_for(layout) else { return unsafe { self.system.alloc(layout) } };
        let Kept { first, count } = &self.sizes[size];
        let taken = first.get();
        if taken.is_null() {
            return unsafe { self.system.alloc(piece(size)) };
        }
        first.set(unsafe { taken.cast::<*mut u8>().read() });
        count.set(count.get() - 1);
        taken
    }

    unsafe fn dealloc(&self, freed: *mut u8, layout: Layout) {
        let Some(size) = size_for(layout) else { return unsafe { self.system.dealloc(freed, layout) } };
        let Kept { first, count } = &self.sizes[size];
        if count.get() == KEPT {
            return unsafe { self.system.dealloc(freed, piece(size)) };
        }
        unsafe { freed.cast::<*mut u8>().write(first.get()) };
        first.set(freed);
        count.set(count.get() + 1);
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match size_for(layout) {
            None => unsafe { self.system.alloc_zeroed(layout) },
            Some(_) => {
                let zeroed = unsafe { self.alloc(layout) };
                if !zeroed.is_null() {
                    unsafe { zeroed.write_bytes(0, layout.size()) };
                }
                zeroed
            }
        }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: the caller guarantees both: `bytes`, rounded up to the alignment, is no more than there can be.
        let wanted = unsafe { Layout::from_size_align_unchecked(bytes, layout.align()) };
        match (size_for(layout), size_for(wanted)) {
            (None, None) => unsafe { self.system.realloc(old, layout, bytes) },
            (Some(before), Some(after)) if before == after => old,
            _ => {
                let new = unsafe { self.alloc(wanted) };
                if !new.is_null() {
                    unsafe {
                        ptr::copy_nonoverlapping(old, new, layout.size().min(bytes));
                        self.dealloc(old, layout);
                    }
                }
                new
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::alloc::System;

    use proptest::prelude::*;

    use super::*;

    /// The system's, which counts what it gave and did not get back.
    #[derive(Default)]
    struct Counting(Cell<usize>);

    // SAFETY: as the system's.
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            self.0.set(self.0.get() + layout.size());
            unsafe { System.alloc(layout) }
        }
        unsafe fn dealloc(&self, freed: *mut u8, layout: Layout) {
            self.0.set(self.0.get() - layout.size());
            unsafe { System.dealloc(freed, layout) }
        }
    }

    /// Something that was allocated, all of whose bytes are the same.
    struct Piece {
        start: *mut u8,
        layout: Layout,
        filled: u8,
    }

    impl Piece {
        fn fill(&mut self, filled: u8) {
            self.filled = filled;
            unsafe { self.start.write_bytes(filled, self.layout.size()) };
        }

        fn is_as_filled(&self, bytes: usize) -> bool {
            (0..bytes).all(|at| unsafe { self.start.add(at).read() } == self.filled)
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Allocate { bytes: usize, align: usize, is_zeroed: bool },
        Resize { which: usize, bytes: usize },
        Free { which: usize },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let bytes = || prop_oneof![4 => 1..=SMALLEST, 4 => 1..=LARGEST + 40, 1 => 1_000..20_000_usize];
        let align = prop_oneof![Just(1_usize), Just(4), Just(8), Just(16), Just(64)];
        let step = prop_oneof![
            4 => (bytes(), align, any::<bool>()).prop_map(|(bytes, align, is_zeroed)| Step::Allocate { bytes, align, is_zeroed }),
            2 => (any::<usize>(), bytes()).prop_map(|(which, bytes)| Step::Resize { which, bytes }),
            3 => any::<usize>().prop_map(|which| Step::Free { which }),
        ];
        prop::collection::vec(step, 0..if cfg!(miri) { 60 } else { 400 })
    }

    #[test]
    fn a_piece_is_as_large_as_what_it_is_for_and_less_than_a_step_larger() {
        let size = |bytes, align| size_for(Layout::from_size_align(bytes, align).expect("a layout"));
        for bytes in 1..=LARGEST {
            let piece = size(bytes, ALIGN).map_or(0, |size| piece(size).size());
            assert!((bytes..bytes.max(SMALLEST) + STEP).contains(&piece), "{piece} for {bytes}");
        }
        assert_eq!((size(LARGEST, ALIGN), size(LARGEST + 1, 1), size(1, 2 * ALIGN)), (Some(SIZES - 1), None, None));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: if cfg!(miri) { 8 } else { 256 }, ..ProptestConfig::default() })]

        #[test]
        fn what_is_allocated_keeps_its_bytes_and_little_is_kept_of_what_was_freed(steps in steps()) {
            let allocator = Allocator::new(Counting::default());
            let mut pieces: Vec<Piece> = Vec::new();
            for (number, step) in steps.into_iter().enumerate() {
                let filled = number as u8 | 1;
                match step {
                    Step::Allocate { bytes, align, is_zeroed } => {
                        let layout = Layout::from_size_align(bytes, align).expect("a layout");
                        let allocate = if is_zeroed { Allocator::alloc_zeroed } else { Allocator::alloc };
                        let mut piece = Piece { start: unsafe { allocate(&allocator, layout) }, layout, filled: 0 };
                        prop_assert!(!piece.start.is_null() && piece.start.addr().is_multiple_of(align));
                        prop_assert!(!is_zeroed || piece.is_as_filled(bytes));
                        piece.fill(filled);
                        pieces.push(piece);
                    }
                    Step::Resize { which, bytes } if !pieces.is_empty() => {
                        let at = which % pieces.len();
                        let piece = &mut pieces[at];
                        piece.start = unsafe { allocator.realloc(piece.start, piece.layout, bytes) };
                        let kept = bytes.min(piece.layout.size());
                        prop_assert!(piece.start.addr().is_multiple_of(piece.layout.align()));
                        piece.layout = Layout::from_size_align(bytes, piece.layout.align()).expect("a layout");
                        prop_assert!(piece.is_as_filled(kept));
                        piece.fill(filled);
                    }
                    Step::Free { which } if !pieces.is_empty() => {
                        let piece = pieces.swap_remove(which % pieces.len());
                        prop_assert!(piece.is_as_filled(piece.layout.size()));
                        unsafe { allocator.dealloc(piece.start, piece.layout) };
                    }
                    _ => {}
                }
            }
            for piece in pieces {
                prop_assert!(piece.is_as_filled(piece.layout.size()));
                unsafe { allocator.dealloc(piece.start, piece.layout) };
            }
            let mut kept = 0;
            for (size, pieces) in allocator.sizes.iter().enumerate() {
                prop_assert!(pieces.count.get() <= KEPT);
                while !pieces.first.get().is_null() {
                    unsafe { System.dealloc(allocator.alloc(piece(size)), piece(size)) };
                    kept += piece(size).size();
                }
            }
            prop_assert_eq!(allocator.system.0.get(), kept, "what is neither given out nor kept went back");
        }
    }
}
