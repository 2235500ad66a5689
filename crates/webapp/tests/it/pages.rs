//! Page sessions, in the role of a page.

use crate::rig::{Home, Kind, Rig};
use rstest::rstest;
use wire::app::{Body, Delta, Event, Node, Op, Rerun, Said, Submit};

const SESSION: &str = "00112233445566778899aabbccddeeff";

fn rerun(path: &str, reset: bool) -> Said {
    Said::Rerun(Rerun { path: path.into(), query: String::new(), reset })
}

fn event(key: &str, value: &str) -> Said {
    Said::Event(Event { key: key.into(), value: value.into() })
}

fn deltas(told: &[Body]) -> Vec<Delta> {
    told.iter()
        .flat_map(|body| {
            if let Body::Deltas(deltas) = body {
                deltas.delta.clone()
            } else {
                vec![]
            }
        })
        .collect()
}

fn whole(told: &[Body]) -> Vec<Node> {
    match deltas(told).first().and_then(|delta| delta.op.clone()) {
        Some(Op::Reset(reset)) => reset.children,
        other => panic!("expected the whole tree first, got {other:?}"),
    }
}

fn find<'a>(nodes: &'a [Node], kind: &str) -> Option<&'a Node> {
    nodes.iter().find_map(|node| {
        if node.kind == kind {
            Some(node)
        } else {
            find(&node.children, kind)
        }
    })
}

fn shown_tab(nodes: &[Node]) -> wire::app::Value {
    let tabs = find(nodes, "tabs").unwrap();
    tabs.props
        .iter()
        .find(|prop| prop.name == "value")
        .unwrap()
        .value
        .clone()
        .unwrap()
}

#[tokio::test]
async fn interaction_sends_only_the_difference() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(&dir).await;
    rig.say("ann", SESSION, rerun("/console", true)).await.unwrap();
    let told = rig.told(SESSION, "ann");
    let tree = whole(&told);
    assert!(matches!(told.last(), Some(Body::RunFinished(_))), "{told:?}");
    let tabs = find(&tree, "tabs").expect("the console has tabs").key.clone();

    rig.say("ann", SESSION, event(&tabs, "1")).await.unwrap();
    let told = rig.told(SESSION, "ann");
    let changes = deltas(&told);
    assert!(
        !changes.is_empty() && changes.iter().all(|delta| !matches!(delta.op, Some(Op::Reset(_)))),
        "{changes:?}"
    );

    rig.say("ann", SESSION, event(&tabs, "1")).await.unwrap();
    assert_eq!(deltas(&rig.told(SESSION, "ann")), [], "nothing changed");
}

#[rstest]
#[case::sqlite(Kind::Sqlite)]
#[case::postgres(Kind::Postgres)]
#[tokio::test]
async fn session_survives_a_restart(#[case] kind: Kind) {
    let home = Home::new(kind).await;
    let rig = home.start().await;
    rig.say("ann", SESSION, rerun("/console", true)).await.unwrap();
    let tabs = find(&whole(&rig.told(SESSION, "ann")), "tabs").unwrap().key.clone();
    rig.say("ann", SESSION, event(&tabs, "2")).await.unwrap();
    rig.stop().await;

    let rig = home.start().await;
    // The page does not notice the restart; its next message is an event.
    rig.say("ann", SESSION, event(&tabs, "3")).await.unwrap();
    assert_eq!(shown_tab(&whole(&rig.told(SESSION, "ann"))), wire::app::Value::Number(3.0));
    rig.stop().await;

    let rig = home.start().await;
    rig.say("ann", SESSION, rerun("/console", true)).await.unwrap();
    assert_eq!(
        shown_tab(&whole(&rig.told(SESSION, "ann"))),
        wire::app::Value::Number(3.0),
        "the chosen tab is remembered"
    );
    rig.stop().await;
}

#[rstest]
#[case::sqlite(Kind::Sqlite)]
#[case::postgres(Kind::Postgres)]
#[tokio::test]
async fn session_lives_in_one_web_app_and_moves_when_that_one_dies(#[case] kind: Kind) {
    let home = Home::new(kind).await;
    let first = home.start().await;
    let second = first.beside(home.config()).await;
    let ids: Vec<String> = (0..12).map(|n| format!("{n:032x}")).collect();
    let mut tabs = String::new();
    for id in &ids {
        first.say("ann", id, rerun("/console", true)).await.unwrap();
        tabs = find(&whole(&first.told(id, "ann")), "tabs").unwrap().key.clone();
    }

    // The page gets the difference to its tree, whichever web app handles the call.
    for tab in ["1", "2", "0", "3", "1", "2"] {
        for id in &ids {
            first.say("ann", id, event(&tabs, tab)).await.unwrap();
            let changes = deltas(&first.told(id, "ann"));
            let is_reset = |delta: &Delta| matches!(delta.op, Some(Op::Reset(_)));
            assert!(!changes.is_empty() && !changes.iter().any(is_reset), "{changes:?}");
        }
    }

    let foreign = first.say("bob", &ids[0], event(&tabs, "1")).await.unwrap_err();
    assert_eq!(foreign.0, 103, "also refused when forwarded: {}", foreign.1);

    second.die().await;
    for id in &ids {
        first.say("ann", id, rerun("/console", true)).await.unwrap();
        whole(&first.told(id, "ann"));
        first.say("ann", id, event(&tabs, "3")).await.unwrap();
        first.told(id, "ann");
        first.say("ann", id, rerun("/console", true)).await.unwrap();
        assert_eq!(shown_tab(&whole(&first.told(id, "ann"))), wire::app::Value::Number(3.0), "{id}");
    }
}

#[tokio::test]
async fn root_navigates_to_a_room_and_unknown_paths_show_not_found() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(&dir).await;
    rig.say("ann", SESSION, rerun("/", true)).await.unwrap();
    let told = rig.told(SESSION, "ann");
    let Some(Body::Navigate(to)) = told.iter().find(|body| matches!(body, Body::Navigate(_))) else {
        panic!("{told:?}")
    };
    assert_eq!(to.path, "/rooms/general");

    rig.say("ann", SESSION, rerun(&to.path, false)).await.unwrap();
    let changes = deltas(&rig.told(SESSION, "ann"));
    let nodes: Vec<Node> = changes
        .into_iter()
        .filter_map(|d| if let Some(Op::Insert(i)) = d.op { i.node } else { None })
        .collect();
    assert!(find(&nodes, "chat").is_some(), "{nodes:?}");

    for place in ["/nowhere", "/rooms/nowhere"] {
        rig.say("ann", SESSION, rerun(place, true)).await.unwrap();
        assert!(find(&whole(&rig.told(SESSION, "ann")), "empty").is_some(), "{place}");
    }
}

#[tokio::test]
async fn page_of_a_deleted_room_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(&dir).await;
    rig.chat("ann", "chat.create_room", serde_json::json!({"name": "den"}))
        .await
        .unwrap();
    rig.say("ann", SESSION, rerun("/rooms/den", true)).await.unwrap();
    let tree = whole(&rig.told(SESSION, "ann"));
    let manages = |tree: &[Node]| {
        let props = find(tree, "chat").unwrap().props.clone();
        props
            .into_iter()
            .find(|prop| prop.name == "manages")
            .unwrap()
            .value
            .unwrap()
    };
    assert_eq!(manages(&tree), wire::app::Value::Flag(true));

    let bobs = "ffeeddccbbaa99887766554433221100";
    rig.say("bob", bobs, rerun("/rooms/den", true)).await.unwrap();
    assert_eq!(manages(&whole(&rig.told(bobs, "bob"))), wire::app::Value::Flag(false));

    rig.chat("ann", "chat.delete_room", serde_json::json!({"room": "den"}))
        .await
        .unwrap();
    rig.say("bob", bobs, rerun("/rooms/den", true)).await.unwrap();
    let tree = whole(&rig.told(bobs, "bob"));
    let title = find(&tree, "empty")
        .unwrap()
        .props
        .iter()
        .find(|prop| prop.name == "title")
        .unwrap();
    assert_eq!(title.value, Some(wire::app::Value::Text("This room was deleted".into())));
}

#[tokio::test]
async fn session_continues_after_refused_messages() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(&dir).await;
    rig.say("ann", SESSION, rerun("/console", true)).await.unwrap();
    let tree = whole(&rig.told(SESSION, "ann"));
    let (tabs, select) = (find(&tree, "tabs").unwrap().key.clone(), find(&tree, "selectbox").unwrap().key.clone());
    let form = Submit { form: "no such form".into(), values: vec![] };
    let refused = [
        event("no such widget", "1"),
        event("", "1"),
        event(&tabs, "99"),
        event(&tabs, "not json"),
        event(&select, "\"not offered\""),
        rerun("no slash", false),
        rerun(&format!("/{}", "x".repeat(2000)), false),
        Said::Submit(form),
    ];
    for said in refused {
        let (code, text) = rig.say("ann", SESSION, said.clone()).await.expect_err("refused");
        assert_eq!(code, 107, "{said:?}: {text}");
    }

    let garbage = rig.rpc("ann", "app.event", &b"\xff\xff\xff"[..]).await.unwrap_err();
    assert_eq!(garbage.0, 107);
    for session in ["", "short", "0011223344556677889900112233445g", &"0".repeat(65)] {
        assert_eq!(rig.say("ann", session, rerun("/", true)).await.unwrap_err().0, 107, "{session}");
    }
    assert_eq!(rig.say("bob", SESSION, event(&tabs, "1")).await.unwrap_err().0, 103, "the session of another user");
    assert_eq!(rig.say("", SESSION, event(&tabs, "1")).await.unwrap_err().0, 101, "a call without a user");
    rig.say("ann", SESSION, event(&tabs, "1")).await.unwrap();
}

#[tokio::test]
async fn exactly_one_web_app_publishes_the_console_samples() {
    let dir = tempfile::tempdir().unwrap();
    let rig = Rig::start(&dir).await;
    let other = tempfile::tempdir().unwrap();
    let second = Rig::on(rig.bus.clone(), crate::rig::config(other.path())).await;

    let count = || rig.events("ops:live").len() + second.events("ops:live").len();
    testkit::eventually(crate::rig::PATIENCE, async || count() >= 4).await;

    let times: Vec<i64> = [&rig, &second]
        .iter()
        .flat_map(|rig| rig.events("ops:live"))
        .map(|sample| sample["t"].as_i64().unwrap())
        .collect();
    let seconds: std::collections::HashSet<i64> = times.iter().map(|t| t / 800).collect();
    assert!(seconds.len() + 2 >= times.len(), "more than one sample a second: {times:?}");
}
