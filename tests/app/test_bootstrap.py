"""What the API tells a GPU worker: its region's broker and store, as workers reach them."""

from dataclasses import replace

PATH = "/api/v1/workers/bootstrap"


def test_a_worker_learns_its_regions_broker_and_store_and_nobody_else_does(client, make_key, settings):
    home = settings.regions["europe-west"]
    worker = make_key("worker")

    told = client.get(f"{PATH}?region=europe-west", headers=worker)
    refused = client.get(PATH, headers=make_key("infer", "read"))

    assert told.json == {
        "region": "europe-west",
        "broker": home.broker,
        "store": home.store,
        "latitude": home.latitude,
        "longitude": home.longitude,
    }
    assert told.headers["Cache-Control"] == "no-store"
    assert client.get(PATH, headers=worker).json["region"] == settings.default_region
    assert (refused.status_code, refused.json["code"]) == (403, "scope_missing")
    assert "redis://" not in refused.text


def test_addresses_that_are_for_workers_alone_win(make_app, settings):
    regions = dict(settings.regions)
    regions["asia-east"] = replace(regions["asia-east"], worker_broker="amqp://gpu:pw@queue.example.com//")
    client = make_app(replace(settings, regions=regions)).test_client()

    told = client.get(f"{PATH}?region=asia-east").json

    assert (told["broker"], told["store"]) == ("amqp://gpu:pw@queue.example.com//", regions["asia-east"].store)


def test_a_region_that_is_not_there_is_refused_with_the_near_ones(client):
    refused = client.get(f"{PATH}?region=asia-eats")

    assert (refused.status_code, refused.json["code"]) == (422, "validation_failed")
    assert "asia-east" in refused.json["detail"]
