//! Certificates for TLS on loopback: an authority of a test's own, and what it signs.

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Its files live as long as it does.
pub struct Authority {
    dir: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new() -> Self {
        let dir = TempDir::new().expect("a temporary directory can be made");
        let key = KeyPair::generate().expect("a key can be made");
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "authority of a test");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("the parameters are whole");
        write(&dir.path().join("ca.pem"), &certificate.pem());
        Self { dir, issuer: Issuer::new(params, key) }
    }

    /// The file by which others trust it.
    pub fn certificate(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// Files of a new certificate and its key, for a server or a client at `host`. The same host again replaces them.
    pub fn issue(&self, host: &str) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().expect("a key can be made");
        let mut params = CertificateParams::new([host.to_string()]).expect("hosts of tests are valid names");
        params.distinguished_name.push(DnType::CommonName, host);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer).expect("the parameters are whole");
        let path = |kind: &str| self.dir.path().join(format!("{host}.{kind}.pem"));
        write(&path("certificate"), &certificate.pem());
        write(&path("key"), &key.serialize_pem());
        (path("certificate"), path("key"))
    }
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).expect("the test's directory is writable");
}
