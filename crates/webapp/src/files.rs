//! Serves the files of the front end, which are embedded in the binary.

use axum::Router;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use rust_embed::RustEmbed;

#[derive(RustEmbed)]
#[folder = "../../frontend/dist"]
#[allow_missing = true]
struct Files;

const SECURITY: [(&str, &str); 5] = [
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; connect-src 'self'; \
         base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "same-origin"),
    ("cross-origin-opener-policy", "same-origin"),
    ("permissions-policy", "camera=(), microphone=(), geolocation=()"),
];

/// Handles every path without a route: a file, or a path inside an app, for which it serves the page.
pub fn routes() -> Router {
    Router::new().fallback(serve)
}

async fn serve(method: Method, uri: Uri, headers: HeaderMap) -> Response {
    if method != Method::GET && method != Method::HEAD {
        return StatusCode::NOT_FOUND.into_response();
    }
    let path = uri.path().trim_start_matches('/');
    // A path without an extension is a path inside an app. With an extension it is a file, which may be missing.
    let is_place = !path.rsplit('/').next().unwrap_or_default().contains('.');
    let name = if is_place { "index.html" } else { path };

    let mut response = file(name, &headers).unwrap_or_else(|| missing(is_place));
    for (name, value) in SECURITY {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Returns a file in the best encoding that the browser accepts. Files were compressed when they were built.
fn file(name: &str, headers: &HeaderMap) -> Option<Response> {
    let accepted = headers
        .get(header::ACCEPT_ENCODING)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let accepts = |encoding: &str| {
        accepted
            .split(',')
            .any(|one| one.split(';').next().is_some_and(|one| one.trim() == encoding))
    };

    let kind = mime_guess::from_path(name).first_or_octet_stream();
    // Brotli first: it is smaller.
    let encoded = [("br", "br"), ("gzip", "gz")]
        .into_iter()
        .find_map(|(encoding, extension)| {
            accepts(encoding)
                .then(|| Files::get(&format!("{name}.{extension}")))
                .flatten()
                .map(|file| (file, encoding))
        });
    let (file, encoding) = match encoded {
        Some((file, encoding)) => (file, Some(encoding)),
        None => (Files::get(name)?, None),
    };

    // Names under assets/ contain a hash of the contents, so they can be cached forever.
    let caching = if name.starts_with("assets/") {
        "public, max-age=31536000, immutable"
    } else {
        "no-cache"
    };

    let mut response = file.data.into_response();
    let out = response.headers_mut();
    out.insert(header::CONTENT_TYPE, HeaderValue::from_str(kind.as_ref()).ok()?);
    out.insert(header::CACHE_CONTROL, HeaderValue::from_static(caching));
    out.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
    if let Some(encoding) = encoding {
        out.insert(header::CONTENT_ENCODING, HeaderValue::from_static(encoding));
    }
    Some(response)
}

fn missing(is_place: bool) -> Response {
    if is_place {
        let text = "This binary was built without the front end. Build it first: make frontend, then cargo build.\n";
        return (StatusCode::SERVICE_UNAVAILABLE, text).into_response();
    }
    (StatusCode::NOT_FOUND, "There is no such file.\n").into_response()
}
