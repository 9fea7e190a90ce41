//! The listeners of the HTTP interface and of the admin interface: bound, and refused where they are open by oversight or in each
//! other's way.
//!
//! Owns: addresses and sockets. Must never know: what is served there.

use std::fs::{self, Permissions};
use std::future::pending;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use kvs_runtime::Clock;
use kvs_txlog::Condition;
use rustix::net::sockopt::ipv6_v6only;
use tokio::net::{TcpSocket, UnixSocket};
use tracing::{info, warn};

use crate::edge::listener::{FileOwner, Listener};
use crate::follow::Followed;
use crate::settings::Serve;
use crate::settings::listen::Address;

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 1024;
/// The pause between two attempts to open the listener of the primary.
const PAUSE: Duration = Duration::from_millis(20);

/// Refuses to be open to a network by oversight. Returns warnings for where that is by intent.
pub fn exposed(args: &Serve) -> Result<Vec<String>> {
    let mut exposures = Vec::new();
    let outside = |address: SocketAddr| !address.ip().to_canonical().is_loopback();
    let (tls, tokens) = (args.tls.tls_cert.is_some(), args.access.tokens.is_some());
    for (flag, address) in http_addresses(args).filter(|(_, address)| outside(*address) && !tls) {
        ensure!(
            tokens || args.access.insecure,
            "{flag} {address} can be reached from elsewhere, without TLS and tokens; give those, or --insecure"
        );
        let open = if tokens { "tokens can be overheard" } else { "everybody can read and change everything" };
        exposures.push(format!("{flag} {address} can be reached from elsewhere, without TLS: {open}"));
    }
    if outside(args.admin) {
        ensure!(
            tokens && !args.access.admin_open,
            "--admin {} can be reached from elsewhere; give --tokens, with one of scope admin and without --admin-open, or \
             listen on 127.0.0.1",
            args.admin
        );
        if !args.tls.admin_tls {
            let open = "tokens can be overheard; give --admin-tls";
            exposures.push(format!("--admin {} can be reached from elsewhere, without TLS: {open}", args.admin));
        }
    }
    Ok(exposures)
}

/// Addresses of the HTTP interface, with their flags.
fn http_addresses(args: &Serve) -> impl Iterator<Item = (&'static str, SocketAddr)> {
    let listen = args.listen.tcp().map(|address| ("--listen", address));
    listen.chain(args.listen_when_primary.map(|address| ("--listen-when-primary", address)))
}

/// Refuses two listeners at one address, of which one could not be opened.
pub fn distinct(args: &Serve) -> Result<()> {
    let tcp: Vec<_> = http_addresses(args).chain([("--admin", args.admin)]).collect();
    let overlap = |one: SocketAddr, other: SocketAddr| {
        let (here, there) = (one.ip().to_canonical(), other.ip().to_canonical());
        one.port() == other.port() && one.port() != 0 && (covers(here, there) || covers(there, here))
    };
    for (index, (flag, address)) in tcp.iter().enumerate() {
        if let Some((other, _)) = tcp[..index].iter().find(|(_, other)| overlap(*address, *other)) {
            bail!("{other} and {flag} {address} are the same address; give each listener another port");
        }
    }
    let all = &args.listen.listen;
    for (index, address) in all.iter().enumerate().filter(|(_, address)| matches!(address, Address::Unix(_))) {
        ensure!(!all[..index].contains(address), "--listen {address} is given twice; give each listener another path");
    }
    Ok(())
}

/// Returns whether a listener at one address takes another one too. `::` takes IPv4 addresses, unless the system is configured
/// otherwise.
fn covers(one: IpAddr, other: IpAddr) -> bool {
    match one {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => other.is_ipv4(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => other.is_ipv6() || is_dual_stack(),
        one => one == other,
    }
}

/// Returns whether a new socket for IPv6 takes connections of IPv4.
fn is_dual_stack() -> bool {
    TcpSocket::new_v6().is_ok_and(|socket| ipv6_v6only(socket).is_ok_and(|only| !only))
}

/// A listener of the HTTP interface that is not open yet. The address of TCP is bound. The file of a Unix socket is not, since
/// until it listens another server could take it for one that was left.
pub enum Reserved {
    Tcp(TcpSocket, SocketAddr),
    Unix(PathBuf),
    /// Of the process that this one replaces, or of the service manager: clients connect already.
    Open(Listener),
}

/// Takes the listeners of the HTTP interface that are `given`, or binds them, before anything slow: an address in use is reported at
/// once.
pub fn reserve(args: &Serve, given: Option<Vec<Listener>>) -> Result<Vec<Reserved>> {
    let all = &args.listen.listen;
    if let Some(given) = given {
        let (sockets, addresses) = (given.len(), all.len());
        let expected = "give one for each --listen, in the same order";
        ensure!(
            sockets == addresses,
            "{sockets} sockets were passed to this process for {addresses} addresses; {expected}"
        );
        let fitting = |(address, given)| Ok(Reserved::Open(fit(given, "--listen", address)?));
        return all.iter().zip(given).map(fitting).collect();
    }
    let reserve = |address: &Address| match address {
        Address::Tcp(address) => {
            let socket = try_bind(*address).with_context(|| cannot_listen(*address, "--listen"))?;
            let address = socket.local_addr()?;
            Ok(Reserved::Tcp(socket, address))
        }
        Address::Unix(path) => {
            free(path)?;
            Ok(Reserved::Unix(path.clone()))
        }
    };
    all.iter().map(reserve).collect()
}

/// Checks that a listener of another process is that of a flag.
fn fit(given: Listener, flag: &str, address: &Address) -> Result<Listener> {
    let fits = match (&given, address) {
        (Listener::Tcp(listener), Address::Tcp(address)) => {
            let bound = listener.local_addr()?;
            bound.ip() == address.ip() && (address.port() == 0 || bound.port() == address.port())
        }
        (Listener::Unix(..), Address::Unix(path)) => given.path().as_ref() == Some(path),
        _ => false,
    };
    let expected = "give the same addresses, in the same order";
    ensure!(fits, "{flag} {address}: the socket that was passed to this process for it is {given}; {expected}");
    Ok(given)
}

/// Takes the listener of the admin interface that is `given`, or opens it.
pub fn admin(given: Option<Listener>, address: SocketAddr) -> Result<StdListener> {
    let listener = match given {
        Some(given) => match fit(given, "--admin", &Address::Tcp(address))? {
            Listener::Tcp(listener) => listener,
            Listener::Unix(..) => bail!("the admin listener is not a Unix socket"),
        },
        None => {
            let opened = try_bind(address).and_then(|socket| socket.listen(BACKLOG));
            opened.with_context(|| cannot_listen(address, "--admin"))?
        }
    };
    Ok(listener.into_std()?)
}

/// Opens the listeners of the HTTP interface.
pub fn open(reserved: Vec<Reserved>, args: &Serve) -> Result<Vec<Arc<Listener>>> {
    let open = |reserved| match reserved {
        Reserved::Tcp(socket, address) => {
            Ok(Listener::Tcp(socket.listen(BACKLOG).with_context(|| cannot_listen(address, "--listen"))?))
        }
        Reserved::Unix(path) => listen_unix(&path, args.listen.listen_mode),
        Reserved::Open(listener) => Ok(listener),
    };
    reserved.into_iter().map(|reserved| open(reserved).map(Arc::new)).collect()
}

fn listen_unix(path: &Path, mode: u32) -> Result<Listener> {
    let listen = || {
        if let Stale::Yes = free(path)? {
            fs::remove_file(path)?;
        }
        let socket = UnixSocket::new_stream()?;
        socket.bind(path)?;
        // Nobody can connect before it listens.
        fs::set_permissions(path, Permissions::from_mode(mode))?;
        anyhow::Ok(Listener::Unix(socket.listen(BACKLOG)?, FileOwner::Server))
    };
    listen().with_context(|| {
        format!("cannot listen on unix:{}; is its directory there and writable? See --listen", path.display())
    })
}

/// Whether the file of a socket was left by a server that is gone.
enum Stale {
    Yes,
    No,
}

/// Checks that nobody listens at this path.
fn free(path: &Path) -> Result<Stale> {
    if !is_socket(path)? {
        return Ok(Stale::No);
    }
    let shown = path.display();
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(Stale::Yes),
        Err(error) => Err(error).with_context(|| format!("--listen unix:{shown}")),
        Ok(_) => bail!("--listen unix:{shown}: another process listens there; stop it, or choose another path"),
    }
}

/// Checks that a Unix socket can be at this path, and returns whether one is there.
fn is_socket(path: &Path) -> Result<bool> {
    let shown = path.display();
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let missing = format!("--listen unix:{shown}: {} is not a directory; make it first", directory.display());
            ensure!(directory.is_dir(), missing);
            Ok(false)
        }
        Err(error) => Err(error).with_context(|| format!("--listen unix:{shown}")),
        Ok(file) => {
            let is_socket = file.file_type().is_socket();
            ensure!(is_socket, "--listen unix:{shown}: the file is there and is not a socket; choose another path");
            Ok(true)
        }
    }
}

/// Checks what only the start of the server would find, except addresses in use: a server that runs has them.
pub fn check(args: &Serve) -> Result<()> {
    for address in &args.listen.listen {
        if let Address::Unix(path) = address {
            is_socket(path)?;
        }
    }
    Ok(())
}

fn try_bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // Else a restart would have to wait for the connections of the run before to be forgotten.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

fn cannot_listen(address: SocketAddr, flag: &str) -> String {
    format!("cannot listen on {address}; stop what listens there, or choose another address with {flag}")
}

/// URL that clients reach the primary at: as configured, or else by the address that it listens on. None for a wildcard
/// address, which is of no use to others.
pub fn advertised(args: &Serve, reserved: &[Reserved]) -> Option<String> {
    let bound = reserved.iter().find_map(|reserved| match reserved {
        Reserved::Tcp(_, address) => Some(*address),
        Reserved::Open(Listener::Tcp(listener)) => listener.local_addr().ok(),
        Reserved::Unix(_) | Reserved::Open(Listener::Unix(..)) => None,
    });
    let scheme = if args.tls.tls_cert.is_some() { "https" } else { "http" };
    let address = args.listen_when_primary.or(bound).filter(|address| !address.ip().is_unspecified());
    args.advertise.clone().or_else(|| Some(format!("{scheme}://{}", address?)))
}

/// The listener of the primary, which is opened when this process is primary and the address is free: a former primary may
/// still have it.
#[derive(Default)]
pub struct WhenPrimary {
    /// Why the address cannot be had yet.
    failure: Mutex<Option<String>>,
    /// The listener while it is open.
    listener: Mutex<Weak<Listener>>,
}

impl WhenPrimary {
    /// Waits until this process is primary, and then for the address. `followed` is there where it began as a standby.
    pub async fn open(
        &self,
        address: Option<SocketAddr>,
        inherited: Option<Listener>,
        followed: Option<Arc<Followed>>,
        clock: &Clock,
    ) -> Arc<Listener> {
        if let Some(listener) = inherited {
            return self.opened(listener);
        }
        let Some(address) = address else { pending().await };
        if let Some(followed) = followed {
            followed.promoted().await;
        }
        loop {
            match try_bind(address).and_then(|socket| socket.listen(BACKLOG)) {
                Ok(listener) => {
                    self.set_failure(None);
                    info!("primary, listening on {address} too");
                    return self.opened(Listener::Tcp(listener));
                }
                Err(error) => {
                    let failure = format!("--listen-when-primary {address} cannot be opened: {error}");
                    if self.set_failure(Some(failure.clone())) {
                        warn!("{failure}; retrying");
                    }
                }
            }
            clock.sleep(PAUSE).await;
        }
    }

    fn opened(&self, listener: Listener) -> Arc<Listener> {
        let listener = Arc::new(listener);
        *self.listener.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&listener);
        listener
    }

    /// Returns the listener, while it is open.
    pub fn listener(&self) -> Option<Arc<Listener>> {
        self.listener.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
    }

    /// Returns whether it is another one than before.
    fn set_failure(&self, failure: Option<String>) -> bool {
        let mut known = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = *known != failure;
        *known = failure;
        is_new
    }

    /// Condition of this listener, for `/readyz`. Clients reach the other one meanwhile.
    pub fn condition(&self) -> Condition {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone();
        failure.map_or(Condition::Well, Condition::But)
    }
}
