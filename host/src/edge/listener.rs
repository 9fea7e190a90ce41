//! Listening sockets: TCP and Unix.
//!
//! Owns: the order in which they accept, and the file of a Unix socket. Must never know: what is served there.

use std::fmt;
use std::fs;
use std::future::poll_fn;
use std::io;
use std::net::{SocketAddr, TcpListener as StdTcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustix::net::{AddressFamily, getsockname};
use tokio::net::{TcpListener, TcpStream, UnixListener};

/// A listening socket.
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, FileOwner),
}

/// Process that removes the file of a Unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileOwner {
    Server,
    /// Keeps the socket open, and starts the server again at the next connection.
    ServiceManager,
}

/// All listening sockets, in turn: none is kept waiting by a flood on another.
pub struct Listeners {
    all: Vec<Arc<Listener>>,
    /// Index of the one to ask first.
    first: usize,
}

impl Listener {
    /// Takes a socket that another process has opened.
    pub fn from_descriptor(socket: OwnedFd, owner: FileOwner) -> io::Result<Self> {
        match getsockname(&socket)?.address_family() {
            AddressFamily::INET | AddressFamily::INET6 => {
                let listener = StdTcpListener::from(socket);
                listener.set_nonblocking(true)?;
                Ok(Self::Tcp(TcpListener::from_std(listener)?))
            }
            AddressFamily::UNIX => {
                let listener = StdUnixListener::from(socket);
                listener.set_nonblocking(true)?;
                Ok(Self::Unix(UnixListener::from_std(listener)?, owner))
            }
            other => Err(io::Error::other(format!("a socket of {other:?}, which is neither TCP nor Unix"))),
        }
    }

    /// Returns the path of a Unix socket.
    pub fn path(&self) -> Option<PathBuf> {
        match self {
            Self::Tcp(_) => None,
            Self::Unix(listener, _) => Some(listener.local_addr().ok()?.as_pathname()?.to_owned()),
        }
    }

    /// Returns the file that this server has to remove. None if it is not there: the socket accepts connections without it.
    pub fn file(&self) -> Option<SocketFile> {
        match (self, self.path()) {
            (Self::Unix(_, FileOwner::Server), Some(path)) => {
                Some(SocketFile { identity: identity(&path).ok()?, path })
            }
            _ => None,
        }
    }

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
    pub fn new(all: Vec<Arc<Listener>>) -> Self {
        Self { all, first: 0 }
    }

    pub fn push(&mut self, listener: Arc<Listener>) {
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

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener, _) => listener.as_fd(),
        }
    }
}

/// The file of a Unix socket.
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketFile {
    /// Removes it, unless another is there by now.
    pub fn remove(self) {
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
            Self::Unix(..) => write!(f, "unix:{}", self.path().unwrap_or_default().display()),
        }
    }
}
