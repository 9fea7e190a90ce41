//! A TLS client.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion, version};

use super::certificates::{Authority, Pair};
use super::server::Server;
use super::wire::{Connection, plain};

/// Versions of TLS that a client speaks.
type Versions = &'static [&'static SupportedProtocolVersion];

pub static TLS12: Versions = &[&version::TLS12];
pub static TLS13: Versions = &[&version::TLS13];
static BOTH: Versions = &[&version::TLS13, &version::TLS12];
pub type Secure = StreamOwned<ClientConnection, TcpStream>;

/// Trusted authority and certificate of a client.
pub struct Client<'c> {
    pub authority: &'c Authority,
    pub shows: Option<&'c Pair>,
    pub versions: Versions,
}

impl<'c> Client<'c> {
    pub fn of(authority: &'c Authority) -> Self {
        Self { authority, shows: None, versions: BOTH }
    }

    pub fn shows(self, pair: &'c Pair) -> Self {
        Self { shows: Some(pair), ..self }
    }

    pub fn open(&self, address: SocketAddr) -> io::Result<Connection<Secure>> {
        self.connect(address).map(Connection::over)
    }

    /// Connects with a handshake. With TLS 1.3, a rejected certificate is an error only at the first read.
    pub fn connect(&self, address: SocketAddr) -> io::Result<Secure> {
        connect(&self.config(), address)
    }

    pub fn config(&self) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.authority.file()).expect("a certificate")).expect("an authority");
        let config = ClientConfig::builder_with_provider(Arc::new(default_provider()));
        let config = config.with_protocol_versions(self.versions).expect("versions").with_root_certificates(roots);
        Arc::new(match self.shows {
            None => config.with_no_client_auth(),
            Some(pair) => config
                .with_client_auth_cert(
                    vec![CertificateDer::from_pem_file(&pair.certificate).expect("a certificate")],
                    PrivateKeyDer::from_pem_file(&pair.key).expect("a key"),
                )
                .expect("a pair"),
        })
    }

    /// The body of a GET.
    pub fn get(&self, server: &Server, path: &str) -> io::Result<String> {
        Ok(self.open(server.address())?.try_ask("GET", path, b"")?.text().to_owned())
    }
}

/// Connections with the same configuration can resume a session.
pub fn connect(config: &Arc<ClientConfig>, address: SocketAddr) -> io::Result<Secure> {
    shake_hands(config, plain(address)?)
}

pub fn shake_hands<S: Read + Write>(
    config: &Arc<ClientConfig>,
    mut stream: S,
) -> io::Result<StreamOwned<ClientConnection, S>> {
    let name = ServerName::try_from("localhost").expect("a name");
    let mut tls = ClientConnection::new(Arc::clone(config), name).expect("a client");
    while tls.is_handshaking() {
        tls.complete_io(&mut stream)?;
    }
    Ok(StreamOwned::new(tls, stream))
}
