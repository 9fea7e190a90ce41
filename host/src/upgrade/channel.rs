//! The pair of sockets between the old and the new process: whole messages, with descriptors.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram as StdDatagram;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use tokio::io::Interest;
use tokio::net::UnixDatagram;

/// Maximum size of a message, and of the number of its descriptors.
const MESSAGE_BYTES: usize = 2 << 10;
const DESCRIPTORS: usize = 64;

pub struct Channel(OwnedFd);

/// A message and its descriptors.
pub struct Message {
    pub text: String,
    pub descriptors: Vec<OwnedFd>,
}

impl Channel {
    /// Returns one end, and the other for another process.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self(ours), theirs))
    }

    pub fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Sends a message. To a process that has ended nothing is sent, and that is no error: the next `receive` returns None.
    pub fn send(&self, text: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::Error::other(format!("more than {DESCRIPTORS} descriptors for a message")));
        }
        let sent = sendmsg(&self.0, &[IoSlice::new(text.as_bytes())], &mut ancillary, SendFlags::NOSIGNAL);
        match sent.map_err(io::Error::from) {
            // A reset: it was killed before it had read everything.
            Err(error) if !matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => Err(error),
            _ => Ok(()),
        }
    }

    /// Waits for a message, at most this long. None when the other end is closed, which is so when its process has ended.
    pub fn receive(&self, timeout: Option<Duration>) -> io::Result<Option<Message>> {
        set_socket_timeout(&self.0, Timeout::Recv, timeout)?;
        self.take()
    }

    /// As `receive`, without a limit and without a thread: those for blocking work may all be reading the log, for watches that
    /// the last upgrade has ended.
    pub async fn received(&self) -> io::Result<Option<Message>> {
        let socket = StdDatagram::from(self.0.try_clone()?);
        socket.set_nonblocking(true)?;
        // Whatever kind of socket it is: only whether there is something to read is asked for.
        let socket = UnixDatagram::from_std(socket)?;
        socket.async_io(Interest::READABLE, || self.take()).await
    }

    fn take(&self) -> io::Result<Option<Message>> {
        let mut bytes = [0; MESSAGE_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut into = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.0, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => break received.bytes,
                Err(error) => match io::Error::from(error) {
                    error if error.kind() == ErrorKind::Interrupted => {}
                    // The other process was killed before it had read everything.
                    error if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
                    error => return Err(error),
                },
            }
        };
        let mut descriptors = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(passed) = message {
                descriptors.extend(passed);
            }
        }
        let text = String::from_utf8_lossy(&bytes[..received]).into_owned();
        Ok((received > 0).then_some(Message { text, descriptors }))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    use super::*;

    #[test]
    fn messages_arrive_whole_with_their_descriptors() {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::new(theirs);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"kept").unwrap();
        ours.send("first", &[]).unwrap();
        ours.send("second", &[file.as_fd(), ours.as_fd()]).unwrap();
        let first = theirs.receive(None).unwrap().unwrap();
        assert_eq!((first.text.as_str(), first.descriptors.len()), ("first", 0));
        let second = theirs.receive(None).unwrap().unwrap();
        assert_eq!((second.text.as_str(), second.descriptors.len()), ("second", 2));
        let mut passed = File::from(second.descriptors.into_iter().next().unwrap());
        passed.rewind().unwrap();
        let mut text = String::new();
        passed.read_to_string(&mut text).unwrap();
        assert_eq!(text, "kept");
        assert_eq!(theirs.receive(Some(Duration::from_millis(1))).err().unwrap().kind(), ErrorKind::WouldBlock);
        drop(ours);
        theirs.send("to nobody", &[]).unwrap();
        assert!(theirs.receive(None).unwrap().is_none());
    }

    #[test]
    fn end_of_other_process_is_received_with_messages_unread() {
        let (ours, theirs) = Channel::pair().unwrap();
        ours.send("unread", &[]).unwrap();
        drop(theirs);
        ours.send("to nobody", &[]).unwrap();
        assert!(ours.receive(None).unwrap().is_none());
    }
}
