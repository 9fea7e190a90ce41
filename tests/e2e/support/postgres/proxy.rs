//! Proxy in front of a database, which can delay, drop or reset traffic.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use socket2::SockRef;

use crate::support::server::PATIENCE;

/// The end of a message that commits a transaction.
const COMMIT: &[u8] = b"COMMIT\0";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Open,
    /// Delays each response by this time.
    Slow(Duration),
    /// Passes requests, and drops responses: the worst kind of disconnect.
    Deaf,
    /// Nothing passes, and neither side is notified.
    Lost,
    /// Connections end at once, old and new.
    Reset,
    /// The next COMMIT passes, and its connection ends before the response. All others are open.
    EndsAtCommit,
}

pub struct Proxy {
    pub port: u16,
    state: Arc<State>,
}

struct State {
    /// The port of the database.
    target: Mutex<u16>,
    way: Mutex<Way>,
    changed: Condvar,
    /// Number of dropped bytes of responses.
    kept: Mutex<u64>,
    kept_more: Condvar,
    open: Mutex<Vec<TcpStream>>,
}

impl Proxy {
    pub fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it has an address");
        let state = Arc::new(State {
            target: Mutex::new(port),
            way: Mutex::new(Way::Open),
            changed: Condvar::new(),
            kept: Mutex::new(0),
            kept_more: Condvar::new(),
            open: Mutex::default(),
        });
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let port = *shared.target.lock().unwrap();
                // For a database that is down, the connection ends.
                let _ = shared.connect(client, SocketAddr::from(([127, 0, 0, 1], port)));
            }
        });
        Self { port: address.port(), state }
    }

    pub fn set(&self, way: Way) {
        *self.state.kept.lock().unwrap() = 0;
        *self.state.way.lock().unwrap() = way;
        self.state.changed.notify_all();
        if way == Way::Reset {
            self.reset();
        }
    }

    /// Connects new connections to this port, as after a move of the address. Existing ones stay.
    pub fn lead_to(&self, port: u16) {
        *self.state.target.lock().unwrap() = port;
    }

    /// Ends all connections.
    pub fn reset(&self) {
        for stream in self.state.open.lock().unwrap().drain(..) {
            let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Waits until a response was dropped.
    pub fn kept_something(&self) {
        let kept = self.state.kept.lock().unwrap();
        let (kept, _) = self.state.kept_more.wait_timeout_while(kept, PATIENCE, |kept| *kept == 0).unwrap();
        assert!(*kept > 0, "no answer was kept back");
    }
}

impl State {
    fn connect(self: &Arc<Self>, client: TcpStream, server: SocketAddr) -> io::Result<()> {
        if *self.way.lock().unwrap() == Way::Reset {
            return Ok(());
        }
        let server = TcpStream::connect(server)?;
        self.open.lock().unwrap().extend([client.try_clone()?, server.try_clone()?]);
        for (mut from, mut to, answers) in [(client.try_clone()?, server.try_clone()?, false), (server, client, true)] {
            let state = Arc::clone(self);
            thread::spawn(move || {
                let _ = state.pass(&mut from, &mut to, answers);
                let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
            });
        }
        Ok(())
    }

    fn pass(&self, from: &mut TcpStream, to: &mut TcpStream, answers: bool) -> io::Result<()> {
        let mut buffer = [0; 64 << 10];
        loop {
            let length = from.read(&mut buffer)?;
            if length == 0 {
                return Ok(());
            }
            let mut way = self.way.lock().unwrap();
            while *way == Way::Lost || *way == Way::Deaf && answers {
                *self.kept.lock().unwrap() += length as u64;
                self.kept_more.notify_all();
                way = self.changed.wait(way).unwrap();
            }
            // Dropped bytes stay lost, also when the mode changes before the end of the connection.
            if *way == Way::Reset {
                return Ok(());
            }
            if *way == Way::EndsAtCommit && !answers && buffer[..length].ends_with(COMMIT) {
                *way = Way::Open;
                drop(way);
                from.shutdown(Shutdown::Both)?;
                return to.write_all(&buffer[..length]);
            }
            if let (Way::Slow(time), true) = (*way, answers) {
                drop(way);
                // This is what it is for.
                thread::sleep(time);
            }
            to.write_all(&buffer[..length])?;
        }
    }
}
