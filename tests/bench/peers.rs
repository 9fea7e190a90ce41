//! What kvs is measured beside: other stores and servers, each started as those who made it would have it, with the same
//! keys in it where it can be given them.

use std::fs::{self, File, Permissions};
use std::io::{BufWriter, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::geteuid;

use crate::process::Server;

pub const REDIS: &str = "redis, in memory";
pub const REDIS_ALWAYS: &str = "redis, `appendfsync always`";
pub const ETCD: &str = "etcd";
pub const BOOK: &str = "Go, net/http";
pub const NGINX: &str = "nginx, one file";

const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/bench/peers");

/// A certificate of its own, in files.
pub struct Pair {
    pub certificate: String,
    pub key: String,
}

impl Pair {
    pub fn new(data: &Path) -> Result<Self> {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
        let [certificate, key] = ["certificate.pem", "key.pem"].map(|name| data.join(name));
        fs::write(&certificate, made.cert.pem())?;
        fs::write(&key, made.signing_key.serialize_pem())?;
        let [certificate, key] = [certificate, key].map(|path| path.to_string_lossy().into_owned());
        Ok(Self { certificate, key })
    }
}

/// redis-server, and whether it has every write on disk before it answers it; else it has none there.
pub fn redis(data: &Path, is_durable: bool, keys: u64, bytes: usize) -> Result<Server> {
    let (address, data) = (free()?, data.join(format!("redis-{is_durable}")));
    fs::create_dir_all(&data)?;
    let mut redis = Command::new("redis-server");
    redis.args(["--bind", "127.0.0.1", "--port", &address.port().to_string(), "--save", "", "--dir"]).arg(data);
    redis.args(["--appendonly", if is_durable { "yes" } else { "no" }, "--appendfsync", "always"]);
    redis.args(["--auto-aof-rewrite-percentage", "0"]);
    let name = if is_durable { REDIS_ALWAYS } else { REDIS };
    let server = Server::at(name, address, redis)?;
    // The names that redis-benchmark asks for.
    let fill = "for n = 0, ARGV[1] - 1 do redis.call('set', string.format('key:%012d', n), ARGV[2]) end";
    let mut cli = Command::new("redis-cli");
    cli.args(["-p", &address.port().to_string(), "eval", fill, "0", &keys.to_string(), &"x".repeat(bytes)]);
    ensure!(cli.stdout(Stdio::null()).status()?.success(), "redis-cli failed");
    Ok(server)
}

/// etcd, which has every write on disk before it answers it, asked through its gateway for JSON over HTTP.
pub fn etcd(data: &Path) -> Result<Server> {
    let (address, others) = (free()?, format!("http://{}", free()?));
    let url = format!("http://{address}");
    let mut etcd = Command::new("etcd");
    etcd.arg("--data-dir").arg(data.join("etcd")).args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
    etcd.args(["--listen-peer-urls", &others, "--initial-advertise-peer-urls", &others]);
    etcd.args(["--initial-cluster", &format!("default={others}")]);
    let server = Server::at(ETCD, address, etcd)?;
    let began = Instant::now();
    // It accepts before it has elected itself.
    while ureq::post(format!("{url}/v3/kv/put")).send(r#"{"key":"YQ==","value":"YQ=="}"#).is_err() {
        ensure!(began.elapsed() < Duration::from_secs(30), "etcd does not serve");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(server)
}

/// The service in the book, in Go, whose log nothing waits for.
pub fn book(data: &Path, keys: u64, bytes: usize, tls: Option<&Pair>) -> Result<Server> {
    let (address, program, log) = (free()?, data.join("book"), data.join("transactions.log"));
    let mut go = Command::new("go");
    go.env("GO111MODULE", "off").arg("build").arg("-o").arg(&program).arg(format!("{SOURCES}/book.go"));
    ensure!(go.status().context("go does not start; `just bench` installs it")?.success(), "go build failed");
    let mut lines = BufWriter::new(File::create(&log)?);
    let value = "x".repeat(bytes);
    for number in 0..keys {
        writeln!(lines, "{}\t2\tkey-{number}\t{value}", number + 1)?;
    }
    lines.into_inner()?;
    let mut book = Command::new(program);
    book.arg(address.to_string()).arg(log);
    if let Some(pair) = tls {
        book.args([&pair.certificate, &pair.key]);
    }
    Ok(Server::at(BOOK, address, book)?.over_tls(tls.is_some()))
}

/// nginx, which sends one file whatever key it is asked for.
pub fn nginx(data: &Path, bytes: usize, tls: Option<&Pair>) -> Result<Server> {
    let (address, home) = (free()?, data.join("nginx"));
    fs::create_dir_all(&home)?;
    fs::set_permissions(data, Permissions::from_mode(0o755))?;
    fs::write(home.join("value"), "x".repeat(bytes))?;
    let pair = tls.map(|pair| format!("ssl_certificate {}; ssl_certificate_key {};", pair.certificate, pair.key));
    let listen = format!("{address}{}", if tls.is_some() { " ssl http2" } else { "" });
    let settings = fs::read_to_string(format!("{SOURCES}/nginx.conf"))?
        .replace("DATA", &home.to_string_lossy())
        .replace("USER", if geteuid().is_root() { "user root;" } else { "" })
        .replace("LISTEN", &listen)
        .replace("TLS", &pair.unwrap_or_default());
    fs::write(home.join("nginx.conf"), settings)?;
    let mut nginx = Command::new("nginx");
    nginx.arg("-p").arg(&home).arg("-c").arg(home.join("nginx.conf"));
    Ok(Server::at(NGINX, address, nginx)?.over_tls(tls.is_some()))
}

/// A PostgreSQL of its own, with the settings it comes with.
pub fn postgres(data: &Path) -> Result<Server> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let newest = versions.map(|version| version.path().join("bin")).max();
    let programs = newest.context("there is no PostgreSQL; `just bench` installs it")?;
    let (home, root) = (data.join("postgres"), geteuid().is_root());
    fs::create_dir(&home)?;
    if root {
        // It does not run as root, and has to reach its own directory.
        let owner = fs::metadata("/var/lib/postgresql")?;
        chown(&home, Some(owner.uid()), Some(owner.gid()))?;
        fs::set_permissions(data, Permissions::from_mode(0o755))?;
    }
    let program = |name: &str| {
        let mut command = Command::new(if root { "setpriv".into() } else { programs.join(name) });
        if root {
            command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]).arg(programs.join(name));
        }
        command.arg("-D").arg(home.join("cluster")).stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    ensure!(program("initdb").args(["-U", "postgres", "-A", "trust"]).status()?.success(), "initdb failed");
    let address = free()?;
    let mut postgres = program("postgres");
    postgres.args(["-h", "127.0.0.1", "-p", &address.port().to_string(), "-c", "unix_socket_directories="]);
    let postgres = Server::at("postgres", address, postgres)?;
    let mut ready = Command::new(programs.join("pg_isready"));
    ready.args(["-q", "-h", "127.0.0.1", "-p", &address.port().to_string()]);
    let began = Instant::now();
    while !ready.status()?.success() {
        ensure!(began.elapsed() < Duration::from_secs(30), "postgres does not serve");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(postgres)
}

/// Where nobody listens yet.
fn free() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}
