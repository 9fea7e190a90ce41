//! Random keys and values, difficult ones among them.
//!
//! Owns: the random generator. A run prints its seed, and the same seed repeats the run.

use std::collections::HashSet;

use fastrand::Rng;

/// Variable with the seed of a failed run, to repeat it.
const SEED: &str = "KVS_TEST_SEED";

/// Returns a random generator, and prints its seed.
pub fn dice() -> Rng {
    let seed = std::env::var(SEED).ok().map(|seed| seed.parse().expect("the seed is a number"));
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("for the same dice again: {SEED}={seed}");
    Rng::with_seed(seed)
}

/// Returns this number of different valid keys.
pub fn keys(rng: &mut Rng, count: usize) -> Vec<String> {
    let mut seen = HashSet::new();
    let mut keys = Vec::with_capacity(count);
    let short = (' '..='~').chain('а'..='я').map(String::from);
    let known =
        ["key", "v1", "%2F", "%252F", "100%", "/", "//", "a//b/", "...", "..a", "a..", "\u{feff}", "e\u{301}", "é"];
    for key in short.chain(known.map(str::to_owned)) {
        if is_allowed(&key) && seen.insert(key.clone()) {
            keys.push(key);
        }
    }
    while keys.len() < count {
        let key = key(rng, keys.len());
        if is_allowed(&key) && seen.insert(key.clone()) {
            keys.push(key);
        }
    }
    rng.shuffle(&mut keys);
    keys
}

/// A second implementation of the rules, without the code under test.
fn is_allowed(key: &str) -> bool {
    let dots = key.split('/').any(|segment| segment == "." || segment == "..");
    (1..=1_024).contains(&key.len()) && !key.chars().any(char::is_control) && !dots
}

fn key(rng: &mut Rng, n: usize) -> String {
    match rng.u8(0..16) {
        0 => format!("with spaces {n}  and more "),
        1 => format!("слово-{n}-文字-حرف"),
        2 => format!("🦀🇨🇭👩‍👩‍👧 {n}"),
        3 => format!("a%2Fb%{n}"),
        4 => format!("100%-{n}-%41"),
        5 => format!("folder/{n}//file/"),
        6 => format!("/{n}/..hidden/..."),
        7 => format!("{n}?ttl=5&x#fragment"),
        8 => format!("\"quoted\" \\ 'back' <{n}> {{}} |^`"),
        9 => padded(format!("{n}"), 'x', 1_024),
        10 => padded(format!("{n}:"), '€', 1_024),
        11 => (0..rng.usize(1..20)).map(|_| rng.char(..)).collect(),
        12 => (0..rng.usize(1..6)).map(|_| rng.alphanumeric()).collect(),
        _ => format!("key-{n}"),
    }
}

/// Returns a key of the largest size, or slightly shorter where a character does not fit.
fn padded(mut text: String, with: char, bytes: usize) -> String {
    while text.len() + with.len_utf8() <= bytes {
        text.push(with);
    }
    text
}

/// Invalid keys: tabs and newlines, which would break the lines of a text log.
pub fn control_keys() -> Vec<String> {
    ["\t", "\n", "a\tb", "a\nb", "a\r\nb", "1\t2\tkey\tvalue", "\u{0}", "a\u{7f}", "a\u{85}"].map(str::to_owned).into()
}

/// Returns a value, mostly a small one.
pub fn value(rng: &mut Rng) -> Vec<u8> {
    match rng.u8(0..10) {
        0 => Vec::new(),
        1 => (0..=255).collect(),
        2 => format!("{}\t2\tkey-a\tvalue%20{}\n", rng.u16(..), rng.u16(..)).into_bytes(),
        3 => format!("{}\t1\tkey-a\n", rng.u16(..)).into_bytes(),
        4 => vec![0; rng.usize(1..600)],
        5 => {
            // The magic of a frame, where one could begin.
            let mut value = vec![0; 8 * rng.usize(0..8)];
            value.extend(b"FRME");
            value.resize(value.len() + 60, rng.u8(..));
            value
        }
        _ => bytes(rng, 100),
    }
}

/// Returns a large, unique value.
pub fn large_value(rng: &mut Rng) -> Vec<u8> {
    let mut value = vec![0; 1 << 20];
    rng.fill(&mut value);
    value
}

fn bytes(rng: &mut Rng, most: usize) -> Vec<u8> {
    let mut bytes = vec![0; rng.usize(0..=most)];
    rng.fill(&mut bytes);
    bytes
}
