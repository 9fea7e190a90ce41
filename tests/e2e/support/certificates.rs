//! Certificates for tests: an authority, and valid and invalid certificates of it.
//!
//! Owns: a directory of PEM files. Must never know: their use.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevocationReason, RevokedCertParams,
    SerialNumber, date_time_ymd,
};
use tempfile::TempDir;

/// Certificate authority, and its files.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: TempDir,
}

/// Purpose of a certificate, and its defect.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Server,
    ExpiredServer,
    EarlyServer,
    /// A server whose certificate is valid for this many seconds.
    ShortServer(u64),
    Client,
    ExpiredClient,
    /// Client certificate that is valid for a number of seconds.
    ShortClient(u64),
}

/// Files of a certificate and its key.
#[derive(Clone)]
pub struct Pair {
    pub certificate: String,
    pub key: String,
    serial: u64,
}

impl Authority {
    pub fn new() -> Self {
        Self::named("kvs tests")
    }

    pub fn named(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a key can be made");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("an authority can be made");
        let directory = TempDir::new().expect("a temporary directory can be made");
        let authority = Self { issuer, directory };
        authority.write("ca.pem", &authority.issuer.pem());
        authority
    }

    /// Returns the file of the authority's certificate.
    pub fn file(&self) -> String {
        self.path("ca.pem")
    }

    /// Issues a certificate to `name`, in files of that name.
    pub fn issue(&self, name: &str, kind: Kind, serial: u64) -> Pair {
        let mut params = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()])
            .expect("these are names of servers");
        params.distinguished_name.push(DnType::CommonName, name);
        params.serial_number = Some(SerialNumber::from(serial));
        params.extended_key_usages = vec![match kind {
            Kind::Server | Kind::ExpiredServer | Kind::EarlyServer | Kind::ShortServer(_) => {
                ExtendedKeyUsagePurpose::ServerAuth
            }
            Kind::Client | Kind::ExpiredClient | Kind::ShortClient(_) => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        if kind == Kind::EarlyServer {
            params.not_before = date_time_ymd(3000, 1, 1);
        }
        if matches!(kind, Kind::ExpiredServer | Kind::ExpiredClient) {
            params.not_after = date_time_ymd(2020, 1, 1);
        }
        if let Kind::ShortServer(seconds) | Kind::ShortClient(seconds) = kind {
            params.not_after = (SystemTime::now() + Duration::from_secs(seconds)).into();
        }
        let key = KeyPair::generate().expect("a key can be made");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate can be issued");
        self.write(&format!("{name}.pem"), &certificate.pem());
        self.write(&format!("{name}.key"), &key.serialize_pem());
        Pair { certificate: self.path(&format!("{name}.pem")), key: self.path(&format!("{name}.key")), serial }
    }

    /// Writes a CRL of these certificates.
    pub fn revoke(&self, pairs: &[&Pair]) -> String {
        let revoked = |pair: &&Pair| RevokedCertParams {
            serial_number: SerialNumber::from(pair.serial),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: Some(RevocationReason::KeyCompromise),
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(3000, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: pairs.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.issuer).expect("a list can be signed");
        self.write("crl.pem", &list.pem().expect("a list can be written"));
        self.path("crl.pem")
    }

    /// Returns the path of a file.
    pub fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().expect("a temporary path is text").to_owned()
    }

    pub fn write(&self, name: &str, pem: &str) -> String {
        let path: PathBuf = self.directory.path().join(name);
        fs::write(&path, pem).expect("the directory takes a file");
        self.path(name)
    }
}
