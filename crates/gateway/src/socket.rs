//! The listening socket. Its mode is restricted from the moment it exists, and it never replaces a socket in use.

use crate::Error;
use std::fs::{DirBuilder, TryLockError};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};

/// The size of `sun_path` without its terminating zero.
const PATH_MAX: usize = 107;
/// How long to wait while another gateway that is starting holds the lock; a start takes milliseconds.
const LOCK_WAIT: Duration = Duration::from_secs(5);
const LOCK_POLL: Duration = Duration::from_millis(5);

/// A listening socket. Dropping it removes the socket file, unless another process has replaced the file.
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// `None` if the socket was inherited.
    file: Option<File>,
}

/// A socket file that this process created.
#[derive(Debug, Clone)]
pub struct File {
    path: PathBuf,
    inode: u64,
}

impl Listener {
    /// Creates the socket. `shared`: users other than this one can connect, and each connection is checked.
    pub async fn bind(path: &Path, shared: bool) -> Result<Self, Error> {
        let problem = |problem: String| Error::Socket { path: path.display().to_string(), problem };
        let bytes = path.as_os_str().len();
        if bytes > PATH_MAX {
            return Err(problem(format!("the path has {bytes} bytes; a socket's path may have at most {PATH_MAX}")));
        }

        let cannot_listen =
            |e: std::io::Error| format!("cannot listen: {e}; does its directory exist and is it writable?");
        let directory = std::fs::File::open(parent(path)).map_err(|e| problem(cannot_listen(e)))?;

        // Checking the path and binding it must not interleave with another gateway's start.
        lock(&directory).await.map_err(problem)?;
        check_path_free(path).await.map_err(problem)?;
        let listener = bind_private(path, mode(shared)).map_err(|e| problem(cannot_listen(e)))?;

        let inode = std::fs::symlink_metadata(path)
            .map_err(|e| problem(e.to_string()))?
            .ino();
        Ok(Self {
            listener,
            path: path.into(),
            file: Some(File { path: path.into(), inode }),
        })
    }

    /// Listens on an inherited socket. Its file and its mode stay as they are.
    pub fn adopt(inherited: std::os::unix::net::UnixListener) -> Result<Self, Error> {
        let address = inherited.local_addr().ok();
        let path = address
            .as_ref()
            .and_then(|address| address.as_pathname())
            .unwrap_or(Path::new(""))
            .to_path_buf();

        let problem = |problem: String| Error::Socket { path: path.display().to_string(), problem };
        let socket = socket2::SockRef::from(&inherited);
        let unusable = |e: std::io::Error| problem(format!("the inherited descriptor is not a usable socket: {e}"));

        // A service manager may pass any kind of descriptor.
        let stream = socket.domain().map_err(unusable)? == socket2::Domain::UNIX
            && socket.r#type().map_err(unusable)? == socket2::Type::STREAM;
        if !stream || !socket.is_listener().map_err(unusable)? {
            let text = "the inherited descriptor is not a listening Unix stream socket; pass one with ListenStream=";
            return Err(problem(text.into()));
        }

        if path.as_os_str().is_empty() {
            return Err(problem(
                "the inherited socket has no path in the file system, so clients cannot find it".into(),
            ));
        }

        inherited.set_nonblocking(true).map_err(unusable)?;
        let listener = UnixListener::from_std(inherited).map_err(unusable)?;
        Ok(Self { listener, path, file: None })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }

    pub async fn accept(&self) -> std::io::Result<UnixStream> {
        Ok(self.listener.accept().await?.0)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // If the file was removed while this gateway ran, another gateway may have bound the path since.
        if let Some(file) = self.file.as_ref().filter(|file| file.is_current()) {
            let _ = std::fs::remove_file(&file.path);
        }
    }
}

impl File {
    fn is_current(&self) -> bool {
        std::fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode)
    }

    /// Sets whether other users can connect to the socket. Does nothing if the file was replaced.
    pub fn set_shared(&self, shared: bool) -> std::io::Result<()> {
        if !self.is_current() {
            return Ok(());
        }
        std::fs::set_permissions(&self.path, std::fs::Permissions::from_mode(mode(shared)))
    }
}

fn mode(shared: bool) -> u32 {
    if shared { 0o666 } else { 0o600 }
}

fn parent(path: &Path) -> &Path {
    path.parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// Locks the directory until `directory` is dropped. Without the lock, gateways that start at once could all find the
/// path free.
async fn lock(directory: &std::fs::File) -> Result<(), String> {
    let deadline = tokio::time::Instant::now() + LOCK_WAIT;
    loop {
        match directory.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::Error(e)) => return Err(format!("its directory cannot be locked: {e}")),
            Err(TryLockError::WouldBlock) if tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(LOCK_POLL).await;
            }
            Err(TryLockError::WouldBlock) => {
                return Err("another gateway has been starting there for too long; stop it or try again".into());
            }
        }
    }
}

/// Checks that the path is free or holds a stale socket.
async fn check_path_free(path: &Path) -> Result<(), String> {
    let found = match std::fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e.to_string()),
    };

    if !found.file_type().is_socket() {
        return Err("the path is taken by a file that is not a socket; remove it or set another path".into());
    }

    match UnixStream::connect(path).await {
        Ok(stream) => {
            let by = stream
                .peer_cred()
                .ok()
                .and_then(|cred| cred.pid())
                .map(describe)
                .unwrap_or_default();
            Err(format!("another gateway is listening{by}; stop it or set another path"))
        }
        // Stale: left behind by a gateway that was killed.
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => Ok(()),
        Err(e) => Err(format!("cannot tell whether a gateway is listening there: {e}")),
    }
}

fn describe(pid: i32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!(": {} (pid {pid})", name.trim())
}

/// Binds in a directory that only this user may enter, sets the mode there, then renames the socket into place, so that
/// no other user can connect before the mode is set. The directory is named by its descriptor, so that a long path
/// still fits `sun_path`.
fn bind_private(path: &Path, mode: u32) -> std::io::Result<UnixListener> {
    let private = parent(path).join(format!(".beamline-{}", uuid::Uuid::new_v4().simple()));
    DirBuilder::new().mode(0o700).create(&private)?;
    let bound = (|| {
        let dir = std::fs::File::open(&private)?;
        let listener = UnixListener::bind(format!("/proc/self/fd/{}/s", dir.as_raw_fd()))?;
        let inside = private.join("s");
        std::fs::set_permissions(&inside, std::fs::Permissions::from_mode(mode))?;
        std::fs::rename(&inside, path)?;
        Ok(listener)
    })();

    // The socket is still there only if a step failed.
    let _ = std::fs::remove_file(private.join("s"));
    let _ = std::fs::remove_dir(&private);
    bound
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn refused(path: &Path) -> String {
        Listener::bind(path, false).await.err().expect("refused").to_string()
    }

    #[tokio::test]
    async fn socket_is_private_and_removed_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::bind(&path, false).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left beside the socket");

        drop(listener);

        assert!(!path.exists());
    }

    #[tokio::test]
    async fn inherited_socket_is_used_and_left_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let inherited = std::os::unix::net::UnixListener::bind(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let _early = std::os::unix::net::UnixStream::connect(&path).unwrap();

        let listener = Listener::adopt(inherited).unwrap();
        assert_eq!(listener.path(), path);
        listener.accept().await.unwrap();

        drop(listener);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    }

    #[tokio::test]
    async fn inherited_socket_that_does_not_listen_on_a_path_is_refused() {
        use socket2::{Domain, SockAddr, Socket, Type};
        let dir = tempfile::tempdir().unwrap();
        let make = |domain, kind, listens: bool, address: SockAddr| {
            let socket = Socket::new(domain, kind, None).unwrap();
            socket.bind(&address).unwrap();
            if listens {
                socket.listen(1).unwrap();
            }
            Listener::adopt(std::os::fd::OwnedFd::from(socket).into())
                .err()
                .expect("refused")
                .to_string()
        };

        let path = |name| SockAddr::unix(dir.path().join(name)).unwrap();
        let tcp: std::net::SocketAddr = "127.0.0.1:0".parse().unwrap();
        let no_name = SockAddr::unix("").unwrap();

        for (problem, expected) in [
            (make(Domain::UNIX, Type::STREAM, false, path("quiet")), "not a listening"),
            (make(Domain::UNIX, Type::DGRAM, false, path("datagrams")), "not a listening"),
            (make(Domain::UNIX, Type::SEQPACKET, true, path("packets")), "not a listening"),
            (make(Domain::IPV4, Type::STREAM, true, tcp.into()), "not a listening"),
            (make(Domain::UNIX, Type::STREAM, true, no_name), "no path"),
        ] {
            assert!(problem.contains(expected), "{problem}");
        }
    }

    #[tokio::test]
    async fn mode_follows_whether_other_users_are_allowed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::bind(&path, false).await.unwrap();
        let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        listener.file().unwrap().set_shared(true).unwrap();
        assert_eq!(mode(), 0o666);
        listener.file().unwrap().set_shared(false).unwrap();
        assert_eq!(mode(), 0o600);
    }

    #[tokio::test]
    async fn stale_socket_is_replaced_but_one_in_use_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let listener = Listener::bind(&path, false).await.unwrap();
        let error = refused(&path).await;

        assert!(error.contains("another gateway is listening") && error.contains("(pid "), "{error}");

        drop(listener);
    }

    #[tokio::test]
    async fn path_that_is_not_a_socket_is_left_untouched() {
        let dir = tempfile::tempdir().unwrap();
        let [file, folder, link] = ["file", "folder", "link"].map(|name| dir.path().join(name));
        std::fs::write(&file, "precious").unwrap();
        std::fs::create_dir(&folder).unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for path in [&file, &folder, &link] {
            assert!(refused(path).await.contains("not a socket"), "{}", path.display());
        }
        assert_eq!(std::fs::read_to_string(&link).unwrap(), "precious");
    }

    #[tokio::test]
    async fn path_of_the_maximum_length_works_and_a_longer_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let room = PATH_MAX - dir.path().as_os_str().len() - 1;
        let full = dir.path().join("x".repeat(room));
        let listener = Listener::bind(&full, false).await.unwrap();
        UnixStream::connect(&full).await.unwrap();

        drop(listener);

        assert!(
            refused(&dir.path().join("x".repeat(room + 1)))
                .await
                .contains("108 bytes")
        );

        assert!(
            refused(&dir.path().join("missing/s"))
                .await
                .contains("does its directory exist")
        );
    }
}
