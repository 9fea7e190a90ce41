//! The header of the PROXY protocol, version 2, with which a connection of a proxy begins.

use std::io;
use std::net::SocketAddr;

use ppp::v2::{Addresses, Command, Header, PROTOCOL_PREFIX};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Length of the fixed part, which ends with the length of the rest.
const FIXED_BYTES: usize = 16;
/// Maximum length of the rest: addresses, and what the proxy knows of the client's TLS.
const MAX_BYTES: usize = 4 << 10;

/// Error of a connection that does not begin with the header.
#[derive(Debug, thiserror::Error)]
pub enum ProxyHeaderError {
    #[error("PROXY protocol: {0}")]
    Io(#[from] io::Error),
    #[error("the connection of a trusted proxy does not begin with a header of the PROXY protocol, version 2: {0}")]
    Malformed(String),
}

/// Reads the header, and not a byte more. Returns the client's address; none where the proxy connects on its own behalf, or gives
/// no address.
pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<SocketAddr>, ProxyHeaderError> {
    let mut bytes = vec![0; FIXED_BYTES];
    stream.read_exact(&mut bytes).await?;
    if !bytes.starts_with(PROTOCOL_PREFIX) {
        return Err(ProxyHeaderError::Malformed("another signature".to_owned()));
    }
    let length = usize::from(u16::from_be_bytes([bytes[FIXED_BYTES - 2], bytes[FIXED_BYTES - 1]]));
    if length > MAX_BYTES {
        return Err(ProxyHeaderError::Malformed(format!("longer than {MAX_BYTES} bytes")));
    }
    bytes.resize(FIXED_BYTES + length, 0);
    stream.read_exact(&mut bytes[FIXED_BYTES..]).await?;
    let header = Header::try_from(&*bytes).map_err(|error| ProxyHeaderError::Malformed(error.to_string()))?;
    Ok(match (header.command, header.addresses) {
        (Command::Proxy, Addresses::IPv4(given)) => Some((given.source_address, given.source_port).into()),
        (Command::Proxy, Addresses::IPv6(given)) => Some((given.source_address, given.source_port).into()),
        (Command::Local, _) | (Command::Proxy, Addresses::Unspecified | Addresses::Unix(_)) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header with this command, this family and protocol, and these addresses and extensions.
    fn header(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [PROTOCOL_PREFIX, &[0x20 | command, family], &length, rest].concat()
    }

    async fn given(bytes: &[u8]) -> Result<Option<String>, String> {
        let bytes = [bytes, b"GET"].concat();
        let mut stream = &*bytes;
        let given = read(&mut stream).await.map_err(|error| error.to_string())?;
        assert_eq!(stream, b"GET", "more was read");
        Ok(given.map(|address| address.to_string()))
    }

    #[tokio::test]
    async fn header_gives_the_address_of_the_client() {
        let v4 = [203, 0, 113, 7, 10, 0, 0, 1, 0, 80, 0, 81];
        let mut v6 = [0; 36];
        (v6[15], v6[33]) = (1, 80);
        let is = |text: &str| Ok(Some(text.to_owned()));
        assert_eq!(given(&header(1, 0x11, &v4)).await, is("203.0.113.7:80"));
        assert_eq!(given(&header(1, 0x21, &v6)).await, is("[::1]:80"));
        // An extension: what the client's TLS has negotiated.
        assert_eq!(given(&header(1, 0x11, &[&v4[..], &[1, 0, 2, b'h', b'2']].concat())).await, is("203.0.113.7:80"));
        for without in [header(0, 0, &[]), header(0, 0x11, &v4), header(1, 0, &[]), header(1, 0x31, &[0; 216])] {
            assert_eq!(given(&without).await, Ok(None));
        }
    }

    #[tokio::test]
    async fn malformed_header_is_an_error() {
        let long = header(1, 0, &vec![0; MAX_BYTES + 1]);
        let (short, version) = (header(1, 0x11, &[0; 11]), [PROTOCOL_PREFIX, &[0x11, 0x11, 0, 0]].concat());
        for wrong in [&short, &header(2, 0x11, &[0; 12]), &header(1, 0x51, &[0; 12]), &version, &long] {
            let error = given(wrong).await.expect_err("it is malformed");
            assert!(error.contains("does not begin with a header"), "{error}");
        }
        for text in [&b"PROXY TCP4 203.0.113.7 10.0.0.1 80 81\r\n"[..], b"GET / HTTP/1.1\r\nhost: kvs\r\n\r\n"] {
            assert!(matches!(read(&mut &*text).await, Err(ProxyHeaderError::Malformed(_))));
        }
        for cut in [&b""[..], &PROTOCOL_PREFIX[..5], &header(1, 0x11, &[0; 12])[..20]] {
            assert!(matches!(read(&mut &*cut).await, Err(ProxyHeaderError::Io(_))));
        }
    }
}
