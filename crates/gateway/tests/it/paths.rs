//! The path of the socket: other files are never touched, and only one running gateway owns the path.

use bus::Bus;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use tokio_util::sync::CancellationToken;

async fn bus(dir: &Path) -> Bus {
    bus::local::Local::open(dir).await.unwrap()
}

async fn bind(path: &Path, bus: &Bus) -> Result<gateway::Bound, String> {
    let config = gateway::Config { socket: path.into(), ..gateway::Config::default() };
    gateway::bind(config, bus.clone())
        .await
        .map_err(|error| error.to_string())
}

#[tokio::test]
async fn other_files_at_the_path_stay_untouched() {
    let dir = tempfile::tempdir().unwrap();
    let bus = bus(dir.path()).await;
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("directory")).unwrap();
    std::fs::write(at("directory/precious"), "precious").unwrap();
    std::fs::write(at("file"), "precious").unwrap();

    let living = UnixListener::bind(at("living")).unwrap();
    drop(UnixListener::bind(at("stale")).unwrap());
    nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();

    for (link, target) in [
        ("to_directory", "directory"),
        ("to_file", "file"),
        ("to_living", "living"),
        ("to_stale", "stale"),
        ("to_nothing", "nothing"),
        ("to_itself", "to_itself"),
    ] {
        symlink(at(target), at(link)).unwrap();
    }

    for (name, says) in [
        ("directory", "not a socket"),
        ("file", "not a socket"),
        ("fifo", "not a socket"),
        ("to_directory", "not a socket"),
        ("to_file", "not a socket"),
        ("to_living", "not a socket"),
        ("to_stale", "not a socket"),
        ("to_nothing", "not a socket"),
        ("to_itself", "not a socket"),
        ("living", "another gateway is listening"),
        ("file/below", "irectory"),
        ("nowhere/s", "does its directory exist"),
        ("", "not a socket"),
    ] {
        let error = bind(&at(name), &bus)
            .await
            .err()
            .unwrap_or_else(|| panic!("the gateway bound {name}"));
        assert!(error.contains(says) && error.contains(name), "{name}: {error}");
    }

    assert_eq!(std::fs::read_to_string(at("to_file")).unwrap(), "precious");
    assert_eq!(std::fs::read_to_string(at("to_directory/precious")).unwrap(), "precious");
    assert_eq!(std::fs::read_link(at("to_nothing")).unwrap(), at("nothing"));
    assert!(!at("nothing").exists() && std::fs::symlink_metadata(at("stale")).unwrap().file_type().is_socket());
    UnixStream::connect(at("to_living")).unwrap();
    drop(living);

    let left = std::fs::read_dir(dir.path()).unwrap().filter(|entry| {
        entry
            .as_ref()
            .unwrap()
            .file_name()
            .to_string_lossy()
            .starts_with(".beamline")
    });
    assert_eq!(left.count(), 0, "the attempts leave no temporary files");
}

#[tokio::test]
async fn too_long_path_is_refused_and_never_truncated() {
    let dir = tempfile::tempdir().unwrap();
    let bus = bus(dir.path()).await;
    for length in [108, 109, 4096, 10_000] {
        let path = dir.path().join("x".repeat(length - dir.path().as_os_str().len() - 1));
        let error = bind(&path, &bus).await.err().expect("the path is too long");
        assert!(error.contains(&format!("{length} bytes")) && error.contains("107"), "{error}");
    }

    let names = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    assert_eq!(names.filter(|name| name.to_string_lossy().starts_with('x')).count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exactly_one_of_several_starting_gateways_binds_the_path() {
    let dir = tempfile::tempdir().unwrap();
    let bus = bus(dir.path()).await;
    for round in 0..40 {
        let path = dir.path().join(format!("s{round}"));
        if round % 2 == 1 {
            // A gateway that was killed leaves its socket behind.
            drop(UnixListener::bind(&path).unwrap());
        }

        let mut starts = tokio::task::JoinSet::new();
        let start = std::sync::Arc::new(tokio::sync::Barrier::new(4));
        for _ in 0..4 {
            let (path, bus, start) = (path.clone(), bus.clone(), start.clone());
            starts.spawn(async move {
                start.wait().await;
                bind(&path, &bus).await
            });
        }

        let outcomes = starts.join_all().await;
        let (bound, errors): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
        assert_eq!(bound.len(), 1, "round {round}");
        for error in errors {
            let error = error.err().unwrap();
            assert!(error.contains("another gateway is"), "{error}");
        }
        // Clients reach the gateway that has bound the path.
        let cancel = CancellationToken::new();
        let running = tokio::spawn(bound.into_iter().next().unwrap().unwrap().run(cancel.clone()));
        client::Client::connect(&path).await.unwrap().ping().await.unwrap();
        cancel.cancel();
        running.await.unwrap().unwrap();
        assert!(!path.exists(), "the socket is removed at the end");
    }
}

#[tokio::test]
async fn stopping_gateway_does_not_remove_the_socket_of_its_successor() {
    let dir = tempfile::tempdir().unwrap();
    let bus = bus(dir.path()).await;
    let path = dir.path().join("s");
    let first = bind(&path, &bus).await.unwrap();
    // The socket is removed, and another gateway binds the path.
    std::fs::remove_file(&path).unwrap();
    let second = bind(&path, &bus).await.unwrap();
    drop(first);
    assert!(path.exists());

    drop(second);
    assert!(!path.exists());
}
