//! The command line: flags, their `KVS_` variables and their defaults.

use std::collections::BTreeSet;
use std::env;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::{Args, CommandFactory, Parser, Subcommand};
use hyper::header::HeaderValue;
use strsim::jaro;

use crate::admin::command::{Health, Swap};
use crate::client::ClientCommand;
use crate::edge::auth::TokenCommand;
use crate::edge::cors::origin;
use crate::edge::throttle::Rate;
use crate::edge::tls::{ClientFiles, Demand, Files, Least};
use crate::guest::{self, Compile, Source};
use crate::lines::Format;
use crate::log::Place;
use crate::log::command::LogCommand;
use crate::log::file::Durability;

/// A key-value store whose logic is a WebAssembly component.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 120, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,

    /// What to log: error, warn, info, debug or trace, or directives like `info,kvs::edge=debug`
    #[arg(long, global = true, env = "KVS_LOG_FILTER", value_name = "FILTER", default_value = "info")]
    pub log_filter: String,

    /// How to write what is logged: for people, or each line a JSON object
    #[arg(long, global = true, env = "KVS_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    pub log_format: Format,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a store over HTTP
    Serve(Box<Serve>),
    /// Make tokens for those who may use a store
    #[command(subcommand)]
    Token(TokenCommand),
    /// Put another guest in the place of the one that serves, under load
    Swap(Swap),
    /// Ask a server whether it is ready; exit code 1 when it is not
    Health(Health),
    /// Compile a guest ahead of time, for a binary without a compiler
    Compile(Compile),
    /// Tell what a component is, and whether it could serve
    Inspect(Box<Inspect>),
    /// Check, print, carry and compact a log that nobody serves from
    #[command(subcommand)]
    Log(LogCommand),
    #[command(flatten)]
    Client(ClientCommand),
}

/// What the variables of all settings begin with.
const PREFIX: &str = "KVS_";

/// Why a variable of the environment is refused that looks like a setting and is none.
pub fn unknown_variable() -> Option<String> {
    let mut known = BTreeSet::new();
    add_variables(&Cli::command(), &mut known);
    let given: BTreeSet<_> = env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned()).collect();
    let unknown = given.into_iter().find(|name| name.starts_with(PREFIX) && !known.contains(name))?;
    let nearest = known.iter().max_by(|a, b| jaro(a, &unknown).total_cmp(&jaro(b, &unknown)))?;
    // Kubernetes tells every pod so of a service that has this name.
    let advice = match env::var_os("KUBERNETES_SERVICE_HOST") {
        Some(_) if unknown.contains("SERVICE") || unknown.contains("PORT") => {
            "give the pod enableServiceLinks: false".to_owned()
        }
        _ => format!("is {nearest} meant? Unset it, or see kvs serve --help"),
    };
    Some(format!("the variable {unknown} is no setting of kvs; {advice}"))
}

fn add_variables(command: &clap::Command, known: &mut BTreeSet<String>) {
    let named = command.get_arguments().filter_map(|argument| argument.get_env());
    known.extend(named.map(|name| name.to_string_lossy().into_owned()));
    command.get_subcommands().for_each(|command| add_variables(command, known));
}

#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    pub guest: Guest,

    /// Swap the guest whenever its file changes; SIGHUP does so once
    #[arg(long, env = "KVS_WATCH", requires = "guest")]
    pub watch: bool,

    /// Where to listen for HTTP; port 0 takes a free one
    #[arg(long, env = "KVS_LISTEN", value_name = "ADDRESS", default_value = "127.0.0.1:8080", value_parser = address)]
    pub listen: SocketAddr,

    /// Where to listen for those who look after the server: /livez, /readyz, /metrics, /guest; port 0 takes a free one
    #[arg(long, env = "KVS_ADMIN", value_name = "ADDRESS", default_value = "127.0.0.1:9090", value_parser = address)]
    pub admin: SocketAddr,

    /// The directory that holds the log, and what else is kept from one run to the next
    #[arg(long, env = "KVS_DATA", value_name = "DIR", default_value = "./data")]
    pub data: PathBuf,

    /// Where the log is: in files, or in a database, postgres://USER@HOST/DATABASE; see the README. Its password is best in
    /// PGPASSWORD or a file
    #[arg(long, env = "KVS_LOG", value_name = "file|URL", default_value = "file", hide_env_values = true)]
    pub log: Place,

    /// Longest wait for one call of the database that holds the log
    #[arg(long, env = "KVS_LOG_TIMEOUT", value_name = "TIME", default_value = "5s", value_parser = duration)]
    pub log_timeout: Duration,

    /// While another process writes the log in a database, follow it and serve reads; take over when it is gone
    #[arg(long, env = "KVS_STANDBY")]
    pub standby: bool,

    /// When a write is answered: after it is on disk, or as soon as the operating system has it
    #[arg(long, env = "KVS_DURABILITY", default_value = "sync")]
    pub durability: Durability,

    /// Size of a file of the log; the first ones are smaller
    #[arg(long, env = "KVS_SEGMENT_BYTES", value_name = "SIZE", default_value = "64MiB")]
    pub segment_bytes: ByteSize,

    /// Log requests, so many a second at most; what is above is left out, and counted
    #[arg(long, env = "KVS_ACCESS_LOG", value_name = "COUNT", value_parser = count)]
    pub access_log: Option<usize>,

    #[command(flatten)]
    pub tls: Tls,

    #[command(flatten)]
    pub access: Access,

    /// Longest request to wait for, from its first byte to its response
    #[arg(long, env = "KVS_REQUEST_TIMEOUT", value_name = "TIME", default_value = "5s", value_parser = duration,
          help_heading = "Limits")]
    pub request_timeout: Duration,

    /// Longest wait for the head of a request, from its first byte; for that of the first, from the beginning
    #[arg(long, env = "KVS_HEADER_TIMEOUT", value_name = "TIME", default_value = "30s", value_parser = duration,
          help_heading = "Limits")]
    pub header_timeout: Duration,

    /// How long a connection may ask nothing before it is closed; a response must be taken in twice this
    #[arg(long, env = "KVS_IDLE_TIMEOUT", value_name = "TIME", default_value = "75s", value_parser = duration,
          help_heading = "Limits")]
    pub idle_timeout: Duration,

    /// Largest head of a request (answered 431), at least 8 KiB
    #[arg(long, env = "KVS_MAX_HEADER_BYTES", value_name = "SIZE", default_value = "64KiB", value_parser = header_bytes,
          help_heading = "Limits")]
    pub max_header_bytes: ByteSize,

    /// Most headers of a request (answered 431)
    #[arg(long, env = "KVS_MAX_HEADERS", value_name = "COUNT", default_value = "100", value_parser = count,
          help_heading = "Limits")]
    pub max_headers: usize,

    /// Longest target of a request, which is its path and query (answered 414)
    #[arg(long, env = "KVS_MAX_TARGET_BYTES", value_name = "SIZE", default_value = "8KiB", value_parser = target_bytes,
          help_heading = "Limits")]
    pub max_target_bytes: ByteSize,

    /// The slowest that a body may come, in bytes a second, after its first two seconds (answered 408)
    #[arg(long, env = "KVS_MIN_BODY_RATE", value_name = "SIZE", default_value = "1KiB", value_parser = value_bytes,
          help_heading = "Limits")]
    pub min_body_rate: ByteSize,

    /// Most requests under way at once, on all connections (answered 503)
    #[arg(long, env = "KVS_MAX_REQUESTS", value_name = "COUNT", default_value = "1024", value_parser = count,
          help_heading = "Limits")]
    pub max_requests: usize,

    /// Most requests at once on one HTTP/2 connection (more are refused, to be tried again)
    #[arg(long, env = "KVS_MAX_STREAMS", value_name = "COUNT", default_value = "100",
          value_parser = clap::value_parser!(u32).range(1..), help_heading = "Limits")]
    pub max_streams: u32,

    /// Most requests that a client may take back on one HTTP/2 connection, while they wait to be read, before it is closed
    #[arg(long, env = "KVS_MAX_RESETS", value_name = "COUNT", default_value = "20", value_parser = count,
          help_heading = "Limits")]
    pub max_resets: usize,

    /// Largest value (answered 413)
    #[arg(long, env = "KVS_MAX_VALUE_BYTES", value_name = "SIZE", default_value = "1MiB", value_parser = value_bytes,
          help_heading = "Limits")]
    pub max_value_bytes: ByteSize,

    /// Most connections open at once; more wait to be accepted
    #[arg(long, env = "KVS_MAX_CONNECTIONS", value_name = "COUNT", default_value = "1000", value_parser = count,
          help_heading = "Limits")]
    pub max_connections: usize,

    /// Most connections of one address, or of one network of 64 bits; more are closed. A proxy in front needs many
    #[arg(long, env = "KVS_MAX_CONNECTIONS_PER_ADDRESS", value_name = "COUNT", default_value = "500",
          value_parser = count, help_heading = "Limits")]
    pub max_connections_per_address: usize,

    /// How often a stream of events says that it goes on, when nothing happens
    #[arg(long, env = "KVS_STREAM_HEARTBEAT", value_name = "TIME", default_value = "15s", value_parser = duration,
          help_heading = "Limits")]
    pub stream_heartbeat: Duration,

    /// How far behind the reader of a stream of events may be before the stream ends
    #[arg(long, env = "KVS_STREAM_LAG_BYTES", value_name = "SIZE", default_value = "4MiB", value_parser = value_bytes,
          help_heading = "Limits")]
    pub stream_lag_bytes: ByteSize,

    /// Longest that a request may wait for a key to change, whatever it asks for
    #[arg(long, env = "KVS_MAX_HOLD", value_name = "TIME", default_value = "5m", value_parser = duration,
          help_heading = "Limits")]
    pub max_hold: Duration,

    /// How long requests under way may take to finish when the server is stopped
    #[arg(long, env = "KVS_DRAIN", value_name = "TIME", default_value = "10s", value_parser = duration,
          help_heading = "Limits")]
    pub drain: Duration,

    /// How long the guest before is kept after a swap, and put back when the new one traps
    #[arg(long, env = "KVS_PROBATION", value_name = "TIME", default_value = "10s", value_parser = duration,
          help_heading = "Guest")]
    pub probation: Duration,

    /// Instances of the guest, which share out the keys: each is called beside the others and has its own memory
    #[arg(long, env = "KVS_SHARDS", value_name = "COUNT", default_value = "1", value_parser = clap::value_parser!(u8).range(1..=64),
          help_heading = "Guest")]
    pub shards: u8,
}

/// Which guest, and what it may use.
#[derive(Debug, Args)]
#[command(next_help_heading = "Guest")]
pub struct Guest {
    /// The component; without it, the store that came with this binary, or to serve the one swapped in last
    #[arg(id = "guest", env = "KVS_GUEST", value_name = "GUEST.wasm", help_heading = "Arguments")]
    pub file: Option<PathBuf>,

    /// CPU time of one call of the guest
    #[arg(long, env = "KVS_GUEST_CALL_TIMEOUT", value_name = "TIME", default_value = "1s", value_parser = duration)]
    pub guest_call_timeout: Duration,

    /// Memory of an instance of the guest, which holds its keys and values; at most 4 GiB
    #[arg(long, env = "KVS_GUEST_MEMORY_BYTES", value_name = "SIZE", default_value = "4GiB", value_parser = memory_bytes)]
    pub guest_memory_bytes: ByteSize,

    /// Elements of all tables of the guest, which hold its functions
    #[arg(long, env = "KVS_GUEST_TABLE_ELEMENTS", value_name = "COUNT", default_value = "100000", value_parser = count)]
    pub guest_table_elements: usize,

    /// Core instances that the guest may be made of; as many memories, and as many tables
    #[arg(long, env = "KVS_GUEST_INSTANCES", value_name = "COUNT", default_value = "100", value_parser = count)]
    pub guest_instances: usize,

    /// Largest body the guest may answer with (else answered 500); never less than --max-value-bytes
    #[arg(long, env = "KVS_MAX_RESPONSE_BYTES", value_name = "SIZE", default_value = "64MiB", value_parser = value_bytes)]
    pub max_response_bytes: ByteSize,

    /// How often the guest may append to the log in one call; it is told `unavailable` beyond (the default one answers 503)
    #[arg(long, env = "KVS_GUEST_APPENDS", value_name = "COUNT", default_value = "10000",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub guest_appends: u32,

    /// The largest group of events the guest may append at once, as the log counts; it is told `too-large` beyond (the default one
    /// answers 413). Without it, the largest value and 64 KiB for what comes with it
    #[arg(long, env = "KVS_GUEST_APPEND_BYTES", value_name = "SIZE", value_parser = value_bytes)]
    pub guest_append_bytes: Option<ByteSize>,

    /// What the guest may print in a second; the rest is dropped
    #[arg(long, env = "KVS_GUEST_LOG_BYTES", value_name = "SIZE", default_value = "64KiB", value_parser = value_bytes)]
    pub guest_log_bytes: ByteSize,

    /// Longest line the guest may print; a longer one is cut into several
    #[arg(long, env = "KVS_GUEST_LOG_LINE_BYTES", value_name = "SIZE", default_value = "2KiB", value_parser = value_bytes)]
    pub guest_log_line_bytes: ByteSize,

    /// A setting for the guest, which finds it in wasi:config/store; can be repeated (in the variable, one a line)
    #[arg(long, env = "KVS_GUEST_CONFIG", value_name = "KEY=VALUE", value_delimiter = '\n', value_parser = setting)]
    pub guest_config: Vec<(String, String)>,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "TLS")]
pub struct Tls {
    /// Serve HTTPS with this certificate and those that lead to its authority, in PEM; read again when it changes
    #[arg(long, env = "KVS_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,

    /// The key of the certificate, in PEM
    #[arg(long, env = "KVS_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// The oldest version of TLS to speak
    #[arg(long, env = "KVS_TLS_MIN", value_name = "VERSION", default_value = "1.2")]
    pub tls_min: Least,

    /// Know clients by their certificates, issued by an authority in this file, in PEM
    #[arg(long, env = "KVS_CLIENT_CA", value_name = "FILE", requires = "tls_cert")]
    pub client_ca: Option<PathBuf>,

    /// Whether a client must show a certificate; one that is shown must be good in any case
    #[arg(long, env = "KVS_CLIENT_AUTH", default_value = "required")]
    pub client_auth: Demand,

    /// Client certificates that were revoked: a list in PEM of each authority
    #[arg(long, env = "KVS_CLIENT_CRL", value_name = "FILE", requires = "client_ca")]
    pub client_crl: Option<PathBuf>,

    /// Longest wait for the TLS handshake
    #[arg(long, env = "KVS_HANDSHAKE_TIMEOUT", value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub handshake_timeout: Duration,
}

impl Tls {
    /// What TLS is made of, when it is wanted.
    pub fn files(&self) -> Option<Files> {
        let client = self.client_ca.clone().map(|authorities| ClientFiles {
            authorities,
            revoked: self.client_crl.clone(),
            demand: self.client_auth,
        });
        let (certificate, key) = (self.tls_cert.clone()?, self.tls_key.clone()?);
        Some(Files { certificate, key, least: self.tls_min, client })
    }
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Access")]
pub struct Access {
    /// Ask for a token with every request: a file that `kvs token new` writes; read again when it changes
    #[arg(long, env = "KVS_TOKENS", value_name = "FILE")]
    pub tokens: Option<PathBuf>,

    /// Serve whoever can reach an address that is not loopback, without TLS and tokens
    #[arg(long, env = "KVS_INSECURE")]
    pub insecure: bool,

    /// Requests of one client, by its name or else its address: 1000/s, 600/m (answered 429)
    #[arg(long, env = "KVS_RATE_LIMIT", value_name = "COUNT/TIME", value_parser = rate)]
    pub rate_limit: Option<(u32, Duration)>,

    /// Requests of one client at once, before the rate counts; without it, those of one second or minute
    #[arg(long, env = "KVS_RATE_BURST", value_name = "COUNT", requires = "rate_limit",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub rate_burst: Option<u32>,

    /// How long a request above the rate may wait for its turn, rather than be refused at once
    #[arg(long, env = "KVS_RATE_QUEUE", value_name = "TIME", requires = "rate_limit", value_parser = duration)]
    pub rate_queue: Option<Duration>,

    /// Let web pages of this origin, or with * of any, ask and read what is answered; can be repeated
    #[arg(long, env = "KVS_CORS_ORIGIN", value_name = "ORIGIN", value_delimiter = ',', value_parser = origin)]
    pub cors_origin: Vec<HeaderValue>,
}

impl Access {
    /// How often one client may ask, when that is limited.
    pub fn rate(&self) -> Option<Rate> {
        let (count, per) = self.rate_limit?;
        Rate::new(count, per, self.rate_burst, self.rate_queue.unwrap_or_default())
    }
}

impl Guest {
    /// Where it comes from.
    pub fn source(&self) -> Source {
        self.file.clone().map_or(Source::BuiltIn, Source::File)
    }

    /// The largest group of events, where `value_bytes` is the largest value that comes in.
    pub fn group_bytes(&self, value_bytes: ByteSize) -> u64 {
        self.guest_append_bytes.unwrap_or(value_bytes + ByteSize::kib(64)).as_u64()
    }

    /// `value_bytes` is the largest value that comes in.
    pub fn limits(&self, value_bytes: ByteSize) -> anyhow::Result<guest::Limits> {
        Ok(guest::Limits {
            call: self.guest_call_timeout,
            memory_bytes: usize::try_from(self.guest_memory_bytes.as_u64())?,
            table_elements: self.guest_table_elements,
            instances: self.guest_instances,
            value_bytes: usize::try_from(value_bytes.as_u64())?,
            response_bytes: usize::try_from(self.max_response_bytes.max(value_bytes).as_u64())?,
            appends: self.guest_appends,
            log_bytes: usize::try_from(self.guest_log_bytes.as_u64())?,
            log_line_bytes: usize::try_from(self.guest_log_line_bytes.as_u64())?,
        })
    }
}

#[derive(Debug, Args)]
pub struct Inspect {
    #[command(flatten)]
    pub guest: Guest,
}

fn address(text: &str) -> Result<SocketAddr, String> {
    let mut addresses =
        text.to_socket_addrs().map_err(|error| format!("{error}; an address looks like 127.0.0.1:8080"))?;
    addresses.next().ok_or_else(|| "this name has no address".to_owned())
}

fn duration(text: &str) -> Result<Duration, String> {
    let duration =
        humantime::parse_duration(text).map_err(|error| format!("{error}; a time looks like 500ms, 5s or 2m"))?;
    if duration.is_zero() { Err("a time of nothing leaves no time at all".to_owned()) } else { Ok(duration) }
}

fn count(text: &str) -> Result<usize, String> {
    // What a semaphore can count, with room to spare; the system's own limits are far below.
    text.parse()
        .ok()
        .filter(|count| (1..=1 << 24).contains(count))
        .ok_or_else(|| "a count from 1 to 16777216".to_owned())
}

fn rate(text: &str) -> Result<(u32, Duration), String> {
    let (count, per) = text.split_once('/').ok_or("a rate looks like 1000/s or 600/m")?;
    let count = count.parse().ok().filter(|count| (1..=1_000_000).contains(count));
    let per = match per {
        "s" => Some(Duration::from_secs(1)),
        "m" => Some(Duration::from_secs(60)),
        _ => None,
    };
    count.zip(per).ok_or_else(|| "a rate is from 1 to 1000000 a second or minute, like 1000/s or 600/m".to_owned())
}

fn target_bytes(text: &str) -> Result<ByteSize, String> {
    // What hyper takes.
    size(text, 256, 65_534)
}

fn header_bytes(text: &str) -> Result<ByteSize, String> {
    size(text, 8 << 10, 16 << 20)
}

fn value_bytes(text: &str) -> Result<ByteSize, String> {
    size(text, 1, 1 << 30)
}

fn memory_bytes(text: &str) -> Result<ByteSize, String> {
    size(text, 1 << 20, 4 << 30)
}

fn size(text: &str, least: u64, most: u64) -> Result<ByteSize, String> {
    let size: ByteSize = text.parse().map_err(|error| format!("{error}; a size looks like 4096, 64KiB or 1MiB"))?;
    if (least..=most).contains(&size.as_u64()) {
        Ok(size)
    } else {
        Err(format!("a size from {} to {}", ByteSize(least), ByteSize(most)))
    }
}

fn setting(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("a setting looks like KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_have_bounds_and_units() {
        assert_eq!(value_bytes("1MiB"), Ok(ByteSize(1 << 20)));
        assert_eq!(value_bytes("4096"), Ok(ByteSize(4096)));
        assert!(value_bytes("0").is_err());
        assert!(value_bytes("1TiB").is_err());
        assert!(value_bytes("lots").is_err());
    }

    #[test]
    fn every_flag_of_serve_has_its_variable() {
        let command = Cli::command();
        let serve = command.find_subcommand("serve").expect("serve is a subcommand");
        for argument in serve.get_arguments().filter(|argument| argument.get_id() != "help") {
            let variable = format!("KVS_{}", argument.get_id().as_str().to_uppercase());
            assert_eq!(argument.get_env().and_then(|name| name.to_str()), Some(variable.as_str()));
        }
    }
}
