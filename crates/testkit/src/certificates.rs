//! Certificates for TLS on loopback, signed by a test's own certificate authority.

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A certificate authority; dropping it deletes all its files.
pub struct Authority {
    dir: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new() -> Self {
        let dir = TempDir::new().expect("cannot create a temporary directory");
        let key = KeyPair::generate().expect("cannot generate a key");

        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "test authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params
            .self_signed(&key)
            .expect("cannot sign the authority's certificate");
        write(&dir.path().join("ca.pem"), &certificate.pem());
        Self { dir, issuer: Issuer::new(params, key) }
    }

    /// The file of its own certificate, for `ca` settings.
    pub fn certificate(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// Issues a certificate for a server or a client at `host`; returns the files of the certificate and of its key.
    /// A second call for the same host replaces both files.
    pub fn issue(&self, host: &str) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().expect("cannot generate a key");
        let mut params = CertificateParams::new([host.to_string()]).expect("the host is not a valid name");
        params.distinguished_name.push(DnType::CommonName, host);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params
            .signed_by(&key, &self.issuer)
            .expect("cannot sign the certificate");

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
    std::fs::write(path, text).expect("cannot write to the test's directory");
}
