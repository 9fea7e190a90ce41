//! What a request costs, beside a plain hyper map without guest or log, which is the ceiling, and beside other stores.
//!
//! One thing at a time is varied: connections, the size of values, TLS, HTTP/2. Each server has the same keys in it, except
//! where its name says otherwise. Before reads are measured, each response cache is filled by the same reads until its hit rate is
//! steady; the PUTs come before that.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::load::{Done, Load};
use crate::peers::{self, Pair};
use crate::plain_map;
use crate::process::{Server, median};
use crate::replay;
use crate::report::{Report, number};
use crate::warm::warm;

const ROUNDS: usize = 5;
const TIME: Duration = Duration::from_secs(1);
const KEYS: u64 = 1_000_000;
const FEW_KEYS: u64 = 1_000;
/// Of which the slowest to be filled has no more.
const ETCD_KEYS: u64 = 10_000;
const CONNECTIONS: u32 = 64;

const KVS: &str = "kvs";
const KVS_OS: &str = "kvs `--durability os`";
const KVS_SHARDS: &str = "kvs `--shards 2`";
const KVS_FEW: &str = "kvs, 1,000 keys";
const KVS_LARGE_CACHE: &str = "kvs `--response-cache-bytes 2GiB`";
const KVS_NO_CACHE: &str = "kvs `--response-cache-bytes 0`";
const KVS_JS: &str = "kvs, 1,000 keys, guest in JavaScript";

/// The guest in JavaScript, as `just guest-js` builds it.
const JS_GUEST: &str = "target/guests/js.wasm";

/// Kinds of requests, in the order in which they are sent: PUT first, as that is how etcd comes by what is asked for then.
const REQUESTS: [&str; 3] = ["PUT", "GET", ZIPF];
/// The same, with the mixes of YCSB: half of A are PUTs, and a twentieth of B. C, which has none, is `GET Zipf`.
const MIXES: [&str; 5] = ["PUT", "GET", ZIPF, "YCSB A", "YCSB B"];
/// GET of keys of which some are asked for far more often than others.
const ZIPF: &str = "GET Zipf";

/// How a server is spoken to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Via {
    Http,
    Http2,
    Etcd,
    Redis,
}

struct Contender {
    server: Server,
    via: Via,
    keys: u64,
}

pub fn run(data: &Path, report: &mut Report) -> Result<()> {
    let asked = [
        ("wrk", &["-v"][..]),
        ("h2load", &["--version"]),
        ("redis-server", &["--version"]),
        ("etcd", &["--version"]),
        ("go", &["version"]),
        ("nginx", &["-v"]),
    ];
    asked.into_iter().for_each(|(program, how)| report.uses(program, how));

    let contenders = plain(&data.join("small"), KEYS, 100)?;
    let base = compare(report, data, "HTTP/1.1", &contenders, &MIXES, 100, CONNECTIONS)?;
    goals(report, &base);
    for connections in [1, 256] {
        compare(report, data, "HTTP/1.1", &contenders, &REQUESTS, 100, connections)?;
    }
    drop(contenders);
    let contenders = plain(&data.join("large"), FEW_KEYS, 10 << 10)?;
    compare(report, data, "HTTP/1.1", &contenders, &REQUESTS, 10 << 10, CONNECTIONS)?;
    drop(contenders);
    let mut contenders = encrypted(&data.join("encrypted"))?;
    compare(report, data, "HTTP/1.1 and TLS", &contenders, &REQUESTS, 100, CONNECTIONS)?;
    contenders.iter_mut().for_each(|contender| contender.via = Via::Http2);
    compare(report, data, "HTTP/2 and TLS", &contenders, &REQUESTS, 100, CONNECTIONS)?;
    Ok(())
}

/// All that speak HTTP/1.1 or something like it, with a number of keys and values of a number of bytes.
fn plain(data: &Path, keys: u64, bytes: usize) -> Result<Vec<Contender>> {
    let kvs = |name: &'static str, keys, flags: &[&str]| {
        let data = data.join(name.replace([' ', '`', ','], "-"));
        replay::write(&data, keys, bytes, |number| format!("key-{number}"))?;
        Ok::<_, anyhow::Error>(Contender { server: Server::kvs(name, &data, flags)?, via: Via::Http, keys })
    };
    let other = |server, via, keys| Contender { server, via, keys };
    let mut contenders = vec![
        other(plain_map::start(keys, bytes)?, Via::Http, keys),
        kvs(KVS, keys, &[])?,
        kvs(KVS_OS, keys, &["--durability", "os"])?,
        kvs(KVS_SHARDS, keys, &["--shards", "2"])?,
        other(peers::redis(data, false, keys, bytes)?, Via::Redis, keys),
        other(peers::redis(data, true, keys, bytes)?, Via::Redis, keys),
        other(peers::etcd(data)?, Via::Etcd, ETCD_KEYS.min(keys)),
        other(peers::book(data, keys, bytes, None)?, Via::Http, keys),
        other(peers::nginx(data, bytes, None)?, Via::Http, keys),
    ];
    if keys > FEW_KEYS {
        contenders.insert(2, kvs(KVS_FEW, FEW_KEYS, &[])?);
        contenders.insert(3, kvs(KVS_LARGE_CACHE, keys, &["--response-cache-bytes", "2GiB"])?);
        contenders.insert(4, kvs(KVS_NO_CACHE, keys, &["--response-cache-bytes", "0"])?);
        let guest = Path::new(kvs_tests::ROOT).join(JS_GUEST);
        let guest = guest.to_str().context("a path that is not text")?;
        contenders.insert(5, kvs(KVS_JS, FEW_KEYS, &[guest])?);
    }
    Ok(contenders)
}

/// Those that speak TLS and HTTP/2.
fn encrypted(data: &Path) -> Result<Vec<Contender>> {
    let kvs = data.join("kvs");
    replay::write(&kvs, KEYS, 100, |number| format!("key-{number}"))?;
    let pair = Pair::new(data)?;
    let flags = ["--tls-cert", &pair.certificate, "--tls-key", &pair.key];
    let servers = [
        Server::kvs(KVS, &kvs, &flags)?,
        peers::book(data, KEYS, 100, Some(&pair))?,
        peers::nginx(data, 100, Some(&pair))?,
    ];
    Ok(servers.map(|server| Contender { server, via: Via::Http, keys: KEYS }).into())
}

impl Contender {
    fn takes(&self, request: &str) -> bool {
        let is_nginx = self.server.name == peers::NGINX;
        match request {
            "GET" => true,
            "PUT" => !is_nginx,
            // The other generators choose keys their own way, and know no mixes.
            _ => self.via == Via::Http && !is_nginx,
        }
    }

    /// `before` is what it did in the round before.
    fn ask(&self, request: &str, bytes: usize, connections: u32, before: Option<&Done>, data: &Path) -> Result<Done> {
        let etcd = format!("etcd {request}");
        let kind = if self.via == Via::Etcd { &etcd } else { request };
        let load = Load { kind, keys: self.keys, bytes, connections, time: TIME };
        match self.via {
            Via::Http if self.server.admin.is_some() => load.wrk_of_kvs(&self.server),
            Via::Http | Via::Etcd => load.wrk(&self.server),
            Via::Http2 => load.h2load(&self.server, data),
            Via::Redis => {
                let per_second = before.map_or(1_000.0 * f64::from(connections), |before| before.per_second);
                load.redis(&self.server, (per_second * TIME.as_secs_f64()) as u64)
            }
        }
    }
}

/// What each did in one round; none where it does not take such a request.
type Round = Vec<Option<Done>>;

/// What each did, by request and in the order of rounds.
struct Measured<'c> {
    names: Vec<&'c str>,
    rounds: BTreeMap<&'static str, Vec<Round>>,
}

impl Measured<'_> {
    fn all(&self, request: &str, name: &str) -> Vec<&Done> {
        let index = self.names.iter().position(|known| *known == name);
        self.rounds[request].iter().filter_map(|round| round[index?].as_ref()).collect()
    }

    fn median(&self, request: &str, name: &str, of: fn(&Done) -> f64) -> f64 {
        median(self.all(request, name).into_iter().map(of))
    }

    /// The median of what kvs did, in each round, of what another did.
    fn ratio(&self, request: &str, other: &str, of: fn(&Done) -> f64) -> f64 {
        self.ratio_of(KVS, request, other, of)
    }

    /// The same of one that is named.
    fn ratio_of(&self, one: &str, request: &str, other: &str, of: fn(&Done) -> f64) -> f64 {
        let both = self.all(request, one).into_iter().zip(self.all(request, other));
        median(both.map(|(one, other)| of(one) / of(other)))
    }
}

fn throughput(done: &Done) -> f64 {
    done.per_second
}

fn cpu(done: &Done) -> f64 {
    done.cpu_us
}

fn batch(done: &Done) -> f64 {
    done.batch
}

/// Rounds in which all take turns, as a table.
fn compare<'c>(
    report: &mut Report,
    data: &Path,
    transport: &str,
    contenders: &'c [Contender],
    requests: &[&'static str],
    bytes: usize,
    connections: u32,
) -> Result<Measured<'c>> {
    let names = contenders.iter().map(|contender| contender.server.name).collect();
    let mut measured = Measured { names, rounds: BTreeMap::new() };
    for &request in requests {
        for contender in contenders.iter().filter(|contender| request != "PUT" && contender.takes(request)) {
            if contender.via == Via::Http && contender.server.admin.is_some() {
                warm(&contender.server, &Load { kind: request, keys: contender.keys, bytes, connections, time: TIME })?;
            }
        }
        let rounds = measured.rounds.entry(request).or_default();
        for _ in 0..ROUNDS {
            let before = rounds.last();
            let asked = contenders.iter().enumerate().map(|(index, contender)| {
                let before = before.and_then(|round| round[index].as_ref());
                let asked = || contender.ask(request, bytes, connections, before, data);
                contender.takes(request).then(asked).transpose()
            });
            let round = asked.collect::<Result<_>>()?;
            rounds.push(round);
        }
    }
    let keys = contenders.first().map_or(0, |contender| contender.keys);
    report.table(
        format!("{transport}, {bytes}-byte values, {keys} keys, {connections} connections, medians of {ROUNDS} rounds"),
        &[
            "request",
            "server",
            "requests/s",
            "CPU us/request",
            "99% within ms",
            "kvs has its throughput times",
            "and its CPU times",
            "hits of the response cache, %",
            "PUTs of a batch",
        ],
    );
    for &request in requests {
        for contender in contenders.iter().filter(|contender| contender.takes(request)) {
            let name = contender.server.name;
            let keys = if contender.via == Via::Etcd { format!(", {} keys", contender.keys) } else { String::new() };
            report.row(vec![
                request.into(),
                format!("{name}{keys}").into(),
                number(measured.median(request, name, throughput), 0),
                number(measured.median(request, name, cpu), 1),
                number(measured.median(request, name, |done| done.latency.get(1).map_or(f64::NAN, |us| us / 1e3)), 2),
                number(measured.ratio(request, name, throughput), 2),
                number(measured.ratio(request, name, cpu), 2),
                number(measured.median(request, name, |done| 100.0 * done.hit_rate), 1),
                number(measured.median(request, name, batch), 1),
            ]);
        }
    }
    Ok(measured)
}

/// What is aimed at, and how far it is.
fn goals(report: &mut Report, base: &Measured<'_>) {
    report.table("Goals", &["what", "goal", "measured"]);
    let goals = [
        (
            "GET, Zipf, cache at its default, CPU, of the plain map's",
            "at most 1.25",
            base.ratio(ZIPF, plain_map::TITLE, cpu),
        ),
        (
            "GET, cache large enough, CPU, of the plain map's",
            "at most 1.2",
            base.ratio_of(KVS_LARGE_CACHE, "GET", plain_map::TITLE, cpu),
        ),
        (
            "GET, cache off, CPU, of the plain map's",
            "at most 1.45",
            base.ratio_of(KVS_NO_CACHE, "GET", plain_map::TITLE, cpu),
        ),
        (
            "GET of the JavaScript guest, cached, CPU, of the default guest's",
            "at most 1.05",
            base.ratio_of(KVS_JS, "GET", KVS_FEW, cpu),
        ),
        ("durable PUT, CPU, of the plain map's in memory", "at most 1.4", base.ratio("PUT", plain_map::TITLE, cpu)),
        (
            "durable PUT, throughput, of redis's, `appendfsync always`",
            "at least 1.2",
            base.ratio("PUT", peers::REDIS_ALWAYS, throughput),
        ),
        ("GET, throughput, of the Go service's", "at least 1.3", base.ratio("GET", peers::BOOK, throughput)),
        (
            "durable PUT, throughput, of the Go service's, which does not sync",
            "at least 1.0",
            base.ratio("PUT", peers::BOOK, throughput),
        ),
        ("PUTs of a batch", "at least 30", base.median("PUT", KVS, batch)),
    ];
    for (what, goal, measured) in goals {
        report.row(vec![what.into(), goal.into(), number(measured, 2)]);
    }
}
