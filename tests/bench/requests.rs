//! What a request costs the server, beside a plain hyper map without guest or log.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use crate::plain_map;
use crate::process::{Load, Server, median};

const ROUNDS: usize = 5;
const TIME: Duration = Duration::from_secs(4);
const CONNECTIONS: u32 = 64;

pub fn run(data: &Path) -> Result<()> {
    let servers = [
        plain_map::start()?,
        Server::kvs("kvs", &data.join("sync"), &[])?,
        Server::kvs("kvs `--durability os`", &data.join("os"), &["--durability", "os"])?,
    ];
    println!(
        "\nRequests: {CONNECTIONS} connections, 100-byte values, 10,000 keys, {ROUNDS} rounds of {} s each\n",
        TIME.as_secs()
    );
    println!(
        "| request | server | requests/s | CPU us/request | throughput, of the plain map | CPU, of the plain map |"
    );
    println!("|---|---|---:|---:|---:|---:|");
    // PUT first: it fills the store that GET reads.
    for script in ["put", "get"] {
        let mut rounds: Vec<Vec<Load>> = Vec::new();
        for _ in 0..ROUNDS {
            rounds.push(servers.iter().map(|server| server.load(script, CONNECTIONS, TIME)).collect::<Result<_>>()?);
        }
        for (index, server) in servers.iter().enumerate() {
            let median = |of: &dyn Fn(&[Load]) -> f64| median(rounds.iter().map(|round| of(round)));
            println!(
                "| {} | {} | {:.0} | {:.1} | {:.2} | {:.2} |",
                script.to_uppercase(),
                server.name,
                median(&|round| round[index].per_second),
                median(&|round| round[index].cpu_us),
                median(&|round| round[index].per_second / round[0].per_second),
                median(&|round| round[index].cpu_us / round[0].cpu_us),
            );
        }
    }
    Ok(())
}
