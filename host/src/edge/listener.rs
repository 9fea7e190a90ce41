//! Listening sockets: TCP and Unix.
//!
//! Owns: the order in which they accept, and the file of a Unix socket. Must never know: what is served there.

use std::fmt;
use std::fs;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::task::{Context, Poll, ready};

use tokio::net::{TcpListener, TcpStream, UnixListener};

/// A listening socket.
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

/// All listening sockets, in turn: none is kept waiting by a flood on another.
pub struct Listeners {
    all: Vec<Listener>,
    /// Index of the one to ask first.
    first: usize,
}

impl Listener {
    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<(TcpStream, Option<SocketAddr>)>> {
        match self {
            Self::Tcp(listener) => {
                let (stream, address) = ready!(listener.poll_accept(context))?;
                Poll::Ready(Ok((stream, Some(address))))
            }
            Self::Unix(listener, _) => {
                let (stream, _) = ready!(listener.poll_accept(context))?;
                // A stream is read, written, looked into and shut down by the same calls, whichever its family.
                let socket = OwnedFd::from(stream.into_std()?);
                Poll::Ready(TcpStream::from_std(socket.into()).map(|stream| (stream, None)))
            }
        }
    }
}

impl Listeners {
    pub fn new(all: Vec<Listener>) -> Self {
        Self { all, first: 0 }
    }

    pub fn push(&mut self, listener: Listener) {
        self.all.push(listener);
    }

    /// Accepts a connection. One of a Unix socket has no address.
    pub async fn accept(&mut self) -> io::Result<(TcpStream, Option<SocketAddr>)> {
        let count = self.all.len();
        poll_fn(|context| {
            for index in (self.first..self.first + count).map(|index| index % count) {
                if let Poll::Ready(accepted) = self.all[index].poll_accept(context) {
                    self.first = index + 1;
                    return Poll::Ready(accepted);
                }
            }
            Poll::Pending
        })
        .await
    }
}

/// The file of a Unix socket, removed on drop, unless another is there by then.
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketFile {
    /// The file of a socket that was just bound.
    pub fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            // One that is left is removed by the next server.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(listener) => listener.local_addr().map_err(|_| fmt::Error)?.fmt(f),
            Self::Unix(_, file) => write!(f, "unix:{}", file.path.display()),
        }
    }
}
