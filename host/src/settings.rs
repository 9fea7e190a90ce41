//! Settings of the server: flags, their `KVS_` variables and their defaults.

pub mod backup;
mod guest;
#[cfg(feature = "nats")]
mod jetstream;
pub mod listen;
pub mod proxy;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use hyper::header::HeaderValue;
use kvs_txlog::backup::Until;
#[cfg(feature = "nats")]
use kvs_txlog::cluster::nats;
use kvs_txlog::file::Durability;
use kvs_txlog::postgres;

pub use self::guest::Guest;
#[cfg(feature = "nats")]
pub use self::jetstream::Nats;

use crate::admin::host_name;
use crate::edge::cors::origin;
use crate::edge::throttle::Rate;
use crate::edge::tls::{ClientFiles, Demand, Files, Least};
use crate::parse::{
    address, advertise, count, duration, fixed_address, header_bytes, inflight_bytes, rate, read_lease, target_bytes,
    until, value_bytes,
};

#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    pub guest: Guest,

    /// Swap the guest when its file changes; SIGHUP does so once
    #[arg(long, env = "KVS_WATCH_GUEST", requires = "guest")]
    pub watch_guest: bool,

    #[command(flatten)]
    pub listen: listen::Listen,

    /// Address of a second HTTP listener, open while this server is primary
    #[arg(long, env = "KVS_LISTEN_WHEN_PRIMARY", value_name = "ADDRESS", value_parser = fixed_address)]
    pub listen_when_primary: Option<SocketAddr>,

    /// URL of this server as clients reach it, which a standby names while this server is primary. Without it, from the
    /// address of the listener, unless that is a wildcard
    #[arg(long, env = "KVS_ADVERTISE", value_name = "URL", value_parser = advertise)]
    pub advertise: Option<String>,

    /// Address of the admin listener (/livez, /readyz, /primary, /replica, /metrics, /guest, /backup, /history, /stats,
    /// /read-only, /console); port 0 takes a free one
    #[arg(long, env = "KVS_ADMIN", value_name = "ADDRESS", default_value = "127.0.0.1:9090", value_parser = address)]
    pub admin: SocketAddr,

    /// Host name by which requests may address the admin listener, besides addresses and localhost; can be repeated
    #[arg(long, env = "KVS_ADMIN_HOST", value_name = "NAME", value_delimiter = ',', value_parser = host_name)]
    pub admin_host: Vec<String>,

    /// Directory of the transaction log and of everything else that is kept between runs
    #[arg(long, env = "KVS_DATA_DIR", value_name = "DIR", default_value = "./data")]
    pub data_dir: PathBuf,

    /// Check all settings and the guest, and exit: nothing is opened, listened on or written
    #[arg(long, env = "KVS_CHECK")]
    pub check: bool,

    /// Storage of the transaction log: files, a database, postgres://USER@HOST/DATABASE, or NATS JetStream,
    /// nats://HOST,HOST,HOST/NAME
    ///
    /// The password of the database is best given in PGPASSWORD or a password file, and the secrets of NATS in a file that the
    /// URL names: ?creds=FILE or ?nkey=FILE.
    #[arg(long, env = "KVS_TXLOG", value_name = "file|URL", default_value = "file", hide_env_values = true)]
    pub txlog: TxlogStorage,

    /// Timeout of one call of the database that holds the transaction log; at least ten seconds before the server serves. NATS
    /// has fixed ones
    #[arg(long, env = "KVS_TXLOG_TIMEOUT", value_name = "TIME", default_value = "5s", value_parser = duration)]
    pub txlog_timeout: Duration,

    /// Serve a log that no other server uses without changing it: writes are rejected
    #[arg(long, env = "KVS_READ_ONLY", conflicts_with_all = ["standby", "listen_when_primary"])]
    pub read_only: bool,

    /// Serve the log up to a sequence, or up to the first entry that is newer than a time: RFC 3339, or milliseconds since 1970
    /// with `ms`
    #[arg(long, env = "KVS_UNTIL", value_name = "SEQUENCE|TIME", value_parser = until, requires = "read_only",
          conflicts_with_all = ["standby", "listen_when_primary"])]
    pub until: Option<Until>,

    /// Follow the primary, serve stale reads, and take over when it is gone
    #[arg(long, env = "KVS_STANDBY")]
    pub standby: bool,

    /// Serve stale reads while this server is not primary, also to clients that do not ask for them
    #[arg(long, env = "KVS_STALE_READS")]
    pub stale_reads: bool,

    /// Read lease of a primary: for how long it answers reads without the database or NATS, and a standby waits. 2s with a
    /// database, and only with a standby; 10s with NATS
    #[arg(long, env = "KVS_READ_LEASE", value_name = "TIME", value_parser = read_lease)]
    pub read_lease: Option<Duration>,

    #[cfg(feature = "nats")]
    #[command(flatten)]
    pub nats: Nats,

    /// Durability of an acknowledged write: `sync` survives a power cut, `os` the end of the process
    #[arg(long, env = "KVS_DURABILITY", default_value = "sync", value_name = "sync|os",
          value_parser = durability())]
    pub durability: Durability,

    /// Size of a segment file of the transaction log; the first ones are smaller
    #[arg(long, env = "KVS_SEGMENT_BYTES", value_name = "SIZE", default_value = "64MiB")]
    pub segment_bytes: ByteSize,

    /// Access log lines per second, at most; requests over the rate are counted, not logged
    #[arg(long, env = "KVS_ACCESS_LOG_RATE", value_name = "COUNT", value_parser = count)]
    pub access_log_rate: Option<usize>,

    /// Log requests that take longer than this, with the time in the queue, in the guest and until they were durable
    #[arg(long, env = "KVS_SLOW_REQUEST", value_name = "TIME", value_parser = duration)]
    pub slow_request: Option<Duration>,

    #[command(flatten)]
    pub tls: Tls,

    #[command(flatten)]
    pub access: Access,

    #[command(flatten)]
    pub backup: backup::Backup,

    #[command(flatten)]
    pub proxy: proxy::Proxy,

    /// Request timeout, from the first byte to the response
    #[arg(long, env = "KVS_REQUEST_TIMEOUT", value_name = "TIME", default_value = "5s", value_parser = duration,
          help_heading = "Limits")]
    pub request_timeout: Duration,

    /// Header read timeout, from the first byte of a request; of the first request, from the connection
    #[arg(long, env = "KVS_HEADER_TIMEOUT", value_name = "TIME", default_value = "30s", value_parser = duration,
          help_heading = "Limits")]
    pub header_timeout: Duration,

    /// Idle timeout of a connection; a response must be read within twice this
    #[arg(long, env = "KVS_IDLE_TIMEOUT", value_name = "TIME", default_value = "75s", value_parser = duration,
          help_heading = "Limits")]
    pub idle_timeout: Duration,

    /// Largest request head, at least 8 KiB (otherwise 431)
    #[arg(long, env = "KVS_MAX_HEADER_BYTES", value_name = "SIZE", default_value = "64KiB", value_parser = header_bytes,
          help_heading = "Limits")]
    pub max_header_bytes: ByteSize,

    /// Most headers of a request (otherwise 431)
    #[arg(long, env = "KVS_MAX_HEADERS", value_name = "COUNT", default_value = "100", value_parser = count,
          help_heading = "Limits")]
    pub max_headers: usize,

    /// Longest request target, which is path and query (otherwise 414)
    #[arg(long, env = "KVS_MAX_TARGET_BYTES", value_name = "SIZE", default_value = "8KiB", value_parser = target_bytes,
          help_heading = "Limits")]
    pub max_target_bytes: ByteSize,

    /// Lowest rate of a request body, in bytes per second, after its first two seconds (otherwise 408)
    #[arg(long, env = "KVS_MIN_BODY_RATE", value_name = "SIZE", default_value = "1KiB", value_parser = value_bytes,
          help_heading = "Limits")]
    pub min_body_rate: ByteSize,

    /// Most requests in flight, on all connections (otherwise 503)
    #[arg(long, env = "KVS_MAX_REQUESTS", value_name = "COUNT", default_value = "1024", value_parser = count,
          help_heading = "Limits")]
    pub max_requests: usize,

    /// Most concurrent streams of an HTTP/2 connection; more are refused and can be retried
    #[arg(long, env = "KVS_HTTP2_MAX_STREAMS", value_name = "COUNT", default_value = "100",
          value_parser = clap::value_parser!(u32).range(1..), help_heading = "Limits")]
    pub http2_max_streams: u32,

    /// Most pending streams that an HTTP/2 client may reset before its connection is closed
    #[arg(long, env = "KVS_HTTP2_MAX_RESETS", value_name = "COUNT", default_value = "20", value_parser = count,
          help_heading = "Limits")]
    pub http2_max_resets: usize,

    /// Most control frames per second of an HTTP/2 connection, such as PING, SETTINGS, WINDOW_UPDATE and frames without
    /// content, besides those that requests and responses need; more close the connection
    #[arg(long, env = "KVS_HTTP2_MAX_CONTROL_FRAMES", value_name = "COUNT", default_value = "100",
          value_parser = clap::value_parser!(u32).range(1..), help_heading = "Limits")]
    pub http2_max_control_frames: u32,

    /// Largest value (otherwise 413)
    #[arg(long, env = "KVS_MAX_VALUE_BYTES", value_name = "SIZE", default_value = "1MiB", value_parser = value_bytes,
          help_heading = "Limits")]
    pub max_value_bytes: ByteSize,

    /// Most bytes of requests and responses in flight, those that clients do not read included (otherwise 503, and slow
    /// clients are cut); one connection can hold a quarter. Without it, an eighth of the memory, at least 64 MiB
    #[arg(long, env = "KVS_MAX_INFLIGHT_BYTES", value_name = "SIZE", value_parser = inflight_bytes, help_heading = "Limits")]
    pub max_inflight_bytes: Option<ByteSize>,

    /// Most open connections; more wait to be accepted
    #[arg(long, env = "KVS_MAX_CONNECTIONS", value_name = "COUNT", default_value = "1000", value_parser = count,
          help_heading = "Limits")]
    pub max_connections: usize,

    /// Most connections of one address, or of one IPv6 network of 64 bits; more are closed. A proxy in front without
    /// --proxy-protocol needs many
    #[arg(long, env = "KVS_MAX_CONNECTIONS_PER_ADDRESS", value_name = "COUNT", default_value = "500",
          value_parser = count, help_heading = "Limits")]
    pub max_connections_per_address: usize,

    /// Keep-alive interval of a watch without events
    #[arg(long, env = "KVS_WATCH_KEEP_ALIVE", value_name = "TIME", default_value = "15s", value_parser = duration,
          help_heading = "Limits")]
    pub watch_keep_alive: Duration,

    /// Buffer of a watch, in bytes of keys and values; the watch of a slow consumer ends when it is full
    #[arg(long, env = "KVS_WATCH_BUFFER_BYTES", value_name = "SIZE", default_value = "4MiB", value_parser = value_bytes,
          help_heading = "Limits")]
    pub watch_buffer_bytes: ByteSize,

    /// Longest wait of a long poll
    #[arg(long, env = "KVS_MAX_WAIT", value_name = "TIME", default_value = "5m", value_parser = duration,
          help_heading = "Limits")]
    pub max_wait: Duration,

    /// Drain timeout: how long requests in flight may take to finish after SIGTERM
    #[arg(long, env = "KVS_DRAIN_TIMEOUT", value_name = "TIME", default_value = "10s", value_parser = duration,
          help_heading = "Limits")]
    pub drain_timeout: Duration,

    /// Probation after a swap, during which a trap of the new guest rolls back to the previous one
    #[arg(long, env = "KVS_PROBATION", value_name = "TIME", default_value = "10s", value_parser = duration,
          help_heading = "Guest")]
    pub probation: Duration,

    /// Size of the response cache, for responses that the guest declares reusable; 0 turns it off. A response that takes more
    /// than a sixteenth is not kept
    #[arg(
        long,
        env = "KVS_RESPONSE_CACHE_BYTES",
        value_name = "SIZE",
        default_value = "64MiB",
        help_heading = "Guest"
    )]
    pub response_cache_bytes: ByteSize,

    /// Shards: instances of the guest that share out the keys and run in parallel, each with its own memory
    #[arg(long, env = "KVS_SHARDS", value_name = "COUNT", default_value = "1", value_parser = clap::value_parser!(u8).range(1..=64),
          help_heading = "Guest")]
    pub shards: u8,

    /// Hot spare: a second instance in each shard, which follows the first and serves when that traps. Takes as much memory
    /// again; a swap drops the spares and builds others after its probation
    #[arg(long, env = "KVS_SPARE", help_heading = "Guest")]
    pub spare: bool,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "TLS")]
pub struct Tls {
    /// Certificate chain for HTTPS, PEM; reloaded when it changes
    #[arg(long, env = "KVS_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,

    /// Private key of the certificate, PEM
    #[arg(long, env = "KVS_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// TLS for the admin listener too, with the same certificate; it asks for no client certificate
    #[arg(long, env = "KVS_ADMIN_TLS", requires = "tls_cert")]
    pub admin_tls: bool,

    /// Lowest TLS version
    #[arg(long, env = "KVS_TLS_MIN", value_name = "VERSION", default_value = "1.2")]
    pub tls_min: Least,

    /// Authorities of client certificates, PEM: authenticates clients by certificate
    #[arg(long, env = "KVS_CLIENT_CA", value_name = "FILE", requires = "tls_cert")]
    pub client_ca: Option<PathBuf>,

    /// Client certificates: required or optional; one that is presented must be valid in both cases
    #[arg(long, env = "KVS_CLIENT_AUTH", default_value = "required")]
    pub client_auth: Demand,

    /// Revoked client certificates: one CRL of each authority, PEM
    #[arg(long, env = "KVS_CLIENT_CRL", value_name = "FILE", requires = "client_ca")]
    pub client_crl: Option<PathBuf>,

    /// TLS handshake timeout
    #[arg(long, env = "KVS_HANDSHAKE_TIMEOUT", value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub handshake_timeout: Duration,
}

impl Tls {
    /// The files of TLS, when it is configured.
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
    /// Token file, written by `kvs token create`: every request needs a token; reloaded when it changes
    #[arg(long, env = "KVS_TOKENS", value_name = "FILE")]
    pub tokens: Option<PathBuf>,

    /// Ask for no token on the admin listener, which must be on loopback then
    #[arg(long, env = "KVS_ADMIN_OPEN", requires = "tokens")]
    pub admin_open: bool,

    /// Allow an address that is not loopback without TLS and tokens
    #[arg(long, env = "KVS_INSECURE")]
    pub insecure: bool,

    /// Rate limit of one client, by its name or else its address: 1000/s, 600/m (otherwise 429)
    #[arg(long, env = "KVS_RATE_LIMIT", value_name = "COUNT/TIME", value_parser = rate)]
    pub rate_limit: Option<(u32, Duration)>,

    /// Burst of one client over the rate limit; without it, the requests of one second or minute
    #[arg(long, env = "KVS_RATE_BURST", value_name = "COUNT", requires = "rate_limit",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub rate_burst: Option<u32>,

    /// Longest wait of a request over the rate limit before it is rejected
    #[arg(long, env = "KVS_RATE_QUEUE", value_name = "TIME", requires = "rate_limit", value_parser = duration)]
    pub rate_queue: Option<Duration>,

    /// Allowed origin of CORS, or * for any; can be repeated
    #[arg(long, env = "KVS_CORS_ORIGIN", value_name = "ORIGIN", value_delimiter = ',', value_parser = origin)]
    pub cors_origin: Vec<HeaderValue>,
}

impl Access {
    /// The rate limit of one client, when there is one.
    pub fn rate(&self) -> Option<Rate> {
        let (count, per) = self.rate_limit?;
        Rate::new(count, per, self.rate_burst, self.rate_queue.unwrap_or_default())
    }
}

/// Storage of the transaction log.
#[derive(Clone, Debug)]
pub enum TxlogStorage {
    File,
    Postgres(postgres::Url),
    #[cfg(feature = "nats")]
    Nats(nats::Url),
}

// A URL is checked when it is used: a rejected flag is shown whole, password included.
impl From<&str> for TxlogStorage {
    fn from(text: &str) -> Self {
        match text {
            "file" => Self::File,
            #[cfg(feature = "nats")]
            text if text.starts_with("nats://") => Self::Nats(text.into()),
            text => Self::Postgres(text.into()),
        }
    }
}

fn durability() -> impl TypedValueParser<Value = Durability> {
    PossibleValuesParser::new(["sync", "os"]).map(|name| if name == "os" { Durability::Os } else { Durability::Sync })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[derive(clap::Parser)]
    struct Program {
        #[command(flatten)]
        serve: Serve,
    }

    #[test]
    fn every_flag_of_serve_has_its_variable() {
        for argument in Program::command().get_arguments().filter(|argument| argument.get_id() != "help") {
            let variable = format!("KVS_{}", argument.get_id().as_str().to_uppercase());
            assert_eq!(argument.get_env().and_then(|name| name.to_str()), Some(variable.as_str()));
        }
    }
}
