//! Console and screenshot through the controller, large uploads, and what a crash leaves in the repository.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod fake;

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{StatusCode, header},
    response::Response,
    routing::get,
};
use fake::{Fleet, client};
use muster_api::{ImportQuery, JobState, Upload};
use muster_common::ErrorCode;
use muster_repository::{Repository, storage::DirectoryStorage};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A stream endpoint of an agent whose console says everything twice.
async fn stream_endpoint() -> String {
    async fn console(mut request: Request) -> Response {
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let mut stream = hyper_util::rt::TokioIo::new(upgrade.await.unwrap());
            let mut buffer = [0; 64];
            while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                stream.write_all(&buffer[..n]).await.unwrap();
                stream.write_all(&buffer[..n]).await.unwrap();
            }
        });
        Response::builder()
            .status(StatusCode::SWITCHING_PROTOCOLS)
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, "muster-stream")
            .body(Body::empty())
            .unwrap()
    }
    let app = Router::new()
        .route("/bulk/v1/vms/{vm}/console", get(console))
        .route("/bulk/v1/vms/{vm}/screenshot", get(|| async { "a picture" }));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, app).await });
    url
}

#[tokio::test(flavor = "multi_thread")]
async fn console_and_screenshot_come_through_the_controller() {
    let fleet = Fleet::start(1).await;
    fleet.template().await;
    fleet.desktops().await;
    let c = &fleet.client;
    assert_eq!(c.screenshot("desk-01").await.unwrap_err().code(), ErrorCode::Unavailable, "no endpoint was said");
    fleet.agents[0].set_stream_endpoint(&stream_endpoint().await);
    fake::wait_for("the endpoint", async || !c.host("host1").await.unwrap().stream_endpoint.is_empty()).await;

    assert_eq!(&c.screenshot("desk-01").await.unwrap()[..], b"a picture");
    let mut console = c.console("desk-01").await.unwrap();
    console.write_all(b"ls\n").await.unwrap();
    let mut twice = [0; 6];
    console.read_exact(&mut twice).await.unwrap();
    assert_eq!(&twice, b"ls\nls\n");
    assert_eq!(c.console("desk-99").await.unwrap_err().code(), ErrorCode::NotFound);
    assert_eq!(c.vnc("desk-01").await.unwrap_err().code(), ErrorCode::NotFound, "the agent's own refusal");
    // an open console does not keep it from stopping
    let Fleet { controller, .. } = fleet;
    controller.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_upload_is_taken_and_leftovers_of_a_crash_are_removed() {
    let fleet = Fleet::start(0).await;
    let bytes: Vec<u8> = (0..(5u32 << 20) / 4).flat_map(|n| (n / 1000).to_le_bytes()).collect();
    let query = ImportQuery { name: "large".into(), ..Default::default() };
    let job = fleet.client.import_image(&query, Upload::bytes(bytes)).await.unwrap();
    let mut steps = 0;
    let mut events = fleet.client.job_events(&job.id).await.unwrap();
    let mut last = job;
    while let Some(job) = events.next().await.unwrap() {
        steps += 1;
        last = job;
    }
    assert!(steps >= 1);
    assert_eq!(last.state, JobState::Done, "{:?}", last.problem);
    let image = fleet.client.image("large").await.unwrap();
    fleet.client.put_blob(Upload::bytes(vec![1; 3 << 20])).await.unwrap();
    let Fleet { controller, network, dir, .. } = fleet;
    controller.shutdown().await;

    let path = dir.path().join("state/repository");
    let open = || Repository::open(Arc::new(DirectoryStorage::open(&path).unwrap())).unwrap();
    open().ingest(&vec![9u8; 4096], &Default::default(), &mut |_| std::ops::ControlFlow::Continue(())).unwrap();
    assert_eq!(open().references("").unwrap().len(), 3);
    let controller = fake::start_controller(&network, dir.path()).await;
    assert_eq!(client(&controller).image("large").await.unwrap(), image);
    controller.shutdown().await;
    assert_eq!(open().references("").unwrap(), [format!("image.{}", image.digest)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_imported_again_while_it_is_being_deleted_keeps_its_bytes() {
    let fleet = Fleet::start(0).await;
    let c = &fleet.client;
    let bytes: Vec<u8> = (0..1u32 << 16).flat_map(|n| (n / 16).to_le_bytes()).collect();
    let query = ImportQuery { name: "again".into(), ..Default::default() };
    for round in 0..20 {
        let job = c.import_image(&query, Upload::bytes(bytes.clone())).await.unwrap();
        let job = c.follow_job(&job.id, |_| {}).await.unwrap();
        assert_eq!(job.state, JobState::Done, "{:?}", job.problem);
        // what the last deletion has yet to remove is this image's
        let job = c.verify_image("again").await.unwrap();
        let job = c.follow_job(&job.id, |_| {}).await.unwrap();
        assert_eq!(job.state, JobState::Done, "round {round}: {:?}", job.problem);
        assert!(job.result.unwrap()["chunks"].as_u64().unwrap() > 0);
        c.delete_image("again").await.unwrap();
    }
    assert_eq!(c.verify_image("again").await.unwrap_err().code(), ErrorCode::NotFound);
}
