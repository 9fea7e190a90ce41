//! The control socket: where `kvs upgrade` asks a running server, in its data directory.
//!
//! Only for processes of the same user, or of root: the caller names a program that is run.

use std::convert::Infallible;
use std::fs::{self, File};
use std::future::pending;
use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::getuid;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader as AsyncBufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

use super::former::Upgrader;
use crate::audit::Actor;

/// Name of the socket in the data directory.
const NAME: &str = "control";
/// Maximum size of a request, and the timeout for it.
const REQUEST_BYTES: u64 = 8 << 10;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// The listener of a server, once it is primary.
pub struct Control {
    data: PathBuf,
    /// The log is in files: its lock keeps other servers away from the socket.
    is_locked: bool,
    listener: OnceLock<Arc<UnixListener>>,
}

/// Outcome of an upgrade.
pub struct Upgraded {
    /// Number of the new process.
    pub process: u32,
    /// Time without a call.
    pub pause: Duration,
}

impl Control {
    pub fn new(data: &Path, is_locked: bool, inherited: Option<StdListener>) -> Result<Arc<Self>> {
        let control = Self { data: data.to_owned(), is_locked, listener: OnceLock::new() };
        if let Some(listener) = inherited {
            control.open(listener)?;
        }
        Ok(Arc::new(control))
    }

    /// Returns the listener. None before this process is primary.
    pub fn listener(&self) -> Option<&Arc<UnixListener>> {
        self.listener.get()
    }

    fn open(&self, listener: StdListener) -> Result<&Arc<UnixListener>> {
        listener.set_nonblocking(true)?;
        let listener = Arc::new(UnixListener::from_std(listener)?);
        Ok(self.listener.get_or_init(|| listener))
    }

    /// Serves requests. To be called when this process is primary.
    pub async fn serve(&self, upgrader: Arc<Upgrader>) -> Result<Infallible> {
        let listener = match self.listener.get() {
            Some(listener) => listener,
            None => self.open(at(&self.data, |path| {
                if !self.is_locked && StdStream::connect(path).is_ok() {
                    let reason = "another server uses this data directory; give each its own with --data-dir";
                    return Err(io::Error::new(ErrorKind::AddrInUse, reason));
                }
                // That of a server that was killed.
                match fs::remove_file(path) {
                    Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
                    _ => StdListener::bind(path),
                }
            })?)?,
        };
        let mut handed_over = upgrader.handed_over.subscribe();
        loop {
            let (stream, _) = tokio::select! {
                biased;
                // The next process accepts.
                () = async { drop(handed_over.wait_for(|handed_over| *handed_over).await) } => return pending().await,
                accepted = listener.accept() => accepted?,
            };
            let upgrader = Arc::clone(&upgrader);
            let tasks = upgrader.env().tasks.clone();
            tasks.detach("upgrade request", async move {
                if let Err(error) = respond(stream, &upgrader).await {
                    tracing::debug!("a request of the control socket failed: {error:#}");
                }
            });
        }
    }

    /// Removes the socket, if this process has opened it.
    pub fn remove(&self) {
        if self.listener.get().is_some() {
            // The next start replaces what is left.
            let _ = fs::remove_file(self.data.join(NAME));
        }
    }
}

async fn respond(stream: UnixStream, upgrader: &Arc<Upgrader>) -> Result<()> {
    let user = stream.peer_cred()?.uid();
    ensure!(user == getuid().as_raw() || user == 0, "user {user} may not upgrade this server");
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    timeout(REQUEST_TIMEOUT, AsyncBufReader::new(read.take(REQUEST_BYTES)).read_line(&mut line)).await??;
    let request: Value = serde_json::from_str(&line)?;
    let binary = request["binary"].as_str().map(PathBuf::from);
    let timeout = Duration::from_millis(request["timeout_ms"].as_u64().context("no timeout")?);
    let actor = Actor::of_user(user);
    // After an upgrade, this process ends as soon as its connections have.
    let _answering = upgrader.answering.read().await;
    let answer = match upgrader.upgrade(binary, timeout, actor).await {
        Ok(Upgraded { process, pause }) => json!({ "process": process, "pause_ms": pause.as_secs_f64() * 1e3 }),
        Err(error) => json!({ "error": format!("{error:#}") }),
    };
    write.write_all(format!("{answer}\n").as_bytes()).await?;
    Ok(())
}

/// Asks the server of a data directory for an upgrade, and waits for its end.
pub fn request(data: &Path, binary: Option<&Path>, timeout: Duration) -> Result<Upgraded> {
    let binary = match binary {
        Some(binary) => Some(binary.to_str().context("the path of the binary is not UTF-8")?),
        None => None,
    };
    let no_server = || {
        format!(
            "no server can be reached in {}; give the --data-dir of a running server, of the same user",
            data.display()
        )
    };
    let mut stream = at(data, |path| StdStream::connect(path)).with_context(no_server)?;
    let timeout_ms = u64::try_from(timeout.as_millis())?;
    writeln!(stream, "{}", json!({ "binary": binary, "timeout_ms": timeout_ms }))?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).context("the server did not answer")?;
    let answer: Value = serde_json::from_str(&line).context("the server did not answer; see its log lines")?;
    if let Some(error) = answer["error"].as_str() {
        bail!("{error}");
    }
    let process = answer["process"].as_u64().and_then(|process| u32::try_from(process).ok());
    let pause = Duration::from_secs_f64(answer["pause_ms"].as_f64().unwrap_or_default() / 1e3);
    Ok(Upgraded { process: process.context("the server did not name the new process")?, pause })
}

/// Uses the socket of a data directory by a path that is short enough for a socket, however long that of the directory is.
fn at<T>(data: &Path, using: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let directory = File::open(data)?;
    using(Path::new(&format!("/proc/self/fd/{}/{NAME}", directory.as_raw_fd())))
}
