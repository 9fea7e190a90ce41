//! The fixed stream of numbers, where randomness must not be real: SplitMix64 from 0.

/// The randomness of `apply`. It continues from one call to the next, as the boundaries of batches mean nothing.
#[derive(Default)]
pub struct Fixed {
    count: u64,
}

impl Fixed {
    pub fn next(&mut self) -> u64 {
        self.count += 1;
        nth(self.count)
    }
}

/// The number at this place of the stream, from 1 on.
pub fn nth(place: u64) -> u64 {
    let state = place.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
