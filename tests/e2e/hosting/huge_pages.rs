//! Huge pages: the memory of a guest has them soon after it grew, unless the system is set to give none.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::support::server::{PATIENCE, Server};
use crate::support::wire::Connection;

const MIB: usize = 1 << 20;

/// Bytes of the largest linear memory that are in huge pages.
fn huge(server: &Server) -> usize {
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", server.pid())).expect("it runs");
    // A mapping is a line with its addresses and its permissions, and lines with a capital.
    let mut mappings: Vec<(usize, &str, usize)> = Vec::new();
    for line in smaps.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (first, second) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        if let Some((start, end)) = first.split_once('-') {
            let address = |text| usize::from_str_radix(text, 16).expect("an address");
            mappings.push((address(end) - address(start), second, 0));
        } else if let Some((_, _, huge)) = mappings.last_mut().filter(|_| first == "AnonHugePages:") {
            *huge = second.parse::<usize>().expect("a number") << 10;
        }
    }
    // What is reserved for a linear memory follows what is used of it.
    let pairs = mappings.iter().zip(&mappings[1..]);
    let memories =
        pairs.filter(|((_, used, _), (size, reserved, _))| *used == "rw-p" && *reserved == "---p" && *size > 3 << 30);
    memories.map(|((_, _, huge), _)| *huge).max().expect("there is a guest")
}

#[test]
fn memory_of_guest_gets_huge_pages() {
    let setting = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let server = Server::start(&["--shards", "1"]);
    let (mut client, begun, mut stored) = (Connection::open(server.address()), Instant::now(), 0);
    // One more each time: what cannot be joined is tried again when the memory has grown.
    let is_given = !setting.is_empty() && !setting.contains("[never]");
    while stored < 40 || is_given && huge(&server) < stored * MIB / 2 {
        assert!(begun.elapsed() < PATIENCE, "of {stored} MiB, {} bytes are in huge pages", huge(&server));
        assert_eq!(client.ask("PUT", &format!("/v1/{stored}"), &vec![b'x'; MIB]).status, 201);
        stored += 1;
        if stored >= 40 {
            sleep(Duration::from_millis(500));
        }
    }
    if !is_given {
        assert_eq!(huge(&server), 0, "the setting of the system is ignored");
    }
}
