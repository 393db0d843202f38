"""Where a client is: each way of finding out, in its order, and what a stranger may claim."""

from dataclasses import replace

import pytest

from app import create_app
from app.origin import FoundBy, Origins, UnknownRegion
from app.settings import Settings
from tasks.settings import SettingsError

CHINA, JAPAN, INDIA, IRELAND, AMERICA = "114.114.114.114", "133.130.1.1", "49.207.1.1", "185.60.216.35", "8.8.8.8"
CHINA_6, AMERICA_6 = "2400:3200::1", "2001:4860:4860::8888"
PROXY = "10.9.0.1"


def origins(**environ: str) -> Origins:
    return Origins(Settings.from_environ(environ))


def found(place, *args, **kwargs):
    origin = place.find(*args, **kwargs)
    return origin.region, str(origin.found_by)


@pytest.mark.parametrize(
    ("address", "region"),
    [
        (CHINA, "asia-east"),
        (JAPAN, "asia-east"),
        (INDIA, "asia-south"),
        (IRELAND, "europe-west"),
        (AMERICA, "america-north"),
        (CHINA_6, "asia-east"),
        (AMERICA_6, "america-north"),
        (f"::ffff:{IRELAND}", "europe-west"),
        # Countries that no region lists: Brazil, Nigeria, Russia.
        ("200.147.3.157", "america-north"),
        ("105.112.0.1", "europe-west"),
        ("77.88.8.8", "europe-west"),
    ],
)
def test_an_address_belongs_to_the_region_of_its_country_or_to_the_nearest_one(address, region):
    place = origins(DEFAULT_REGION="asia-south" if region != "asia-south" else "asia-east")

    assert found(place, None, peer=address) == (region, "country")


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "::1", "10.1.2.3", "192.168.0.1", "fd00::1", "fe80::1%eth0", "100.64.0.1", "0.0.0.0"),
        *("203.0.113.5", "2001:db8::1", "224.0.0.1", "ff02::1", "", "unix", "nonsense"),
    ],
)
def test_an_address_that_says_nothing_means_the_default_region(address):
    assert found(origins(DEFAULT_REGION="europe-west"), None, peer=address) == ("europe-west", "default")


def test_each_way_of_finding_a_region_yields_to_the_one_before():
    place = origins(TRUSTED_PROXIES=PROXY, CLIENT_REGIONS=f'{{"{CHINA}/32": "asia-south"}}')
    via_proxy = {"peer": PROXY, "forwarded": CHINA}

    assert found(place, "america-north", **via_proxy, told="europe-west") == ("america-north", "request")
    assert found(place, None, **via_proxy, told="europe-west") == ("europe-west", "header")
    assert found(place, None, **via_proxy) == ("asia-south", "network")
    assert found(place, None, peer=PROXY, forwarded=INDIA) == ("asia-south", "country")
    assert found(place, None, peer=PROXY) == ("asia-east", "default")


def test_the_longest_prefix_of_the_operators_table_wins():
    table = '{"10.0.0.0/8": "europe-west", "10.1.0.0/16": "asia-south", "10.1.2.3": "asia-east", "2001:db8::/32": '
    place = origins(CLIENT_REGIONS=table + '"america-north", "::ffff:172.16.0.0/108": "europe-west"}')

    homes = {
        "10.2.0.1": "europe-west",
        "10.1.9.9": "asia-south",
        "10.1.2.3": "asia-east",
        "::ffff:10.1.9.9": "asia-south",
        "2001:db8:1::2": "america-north",
        "172.16.4.4": "europe-west",
    }
    assert {address: found(place, None, peer=address) for address in homes} == {
        address: (region, "network") for address, region in homes.items()
    }


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "10.9.0.2", AMERICA])
def test_what_a_stranger_says_of_itself_is_not_believed(peer):
    place = origins(TRUSTED_PROXIES=PROXY)

    believed = place.find(None, peer=peer, told="europe-west", forwarded=CHINA)

    assert believed == place.find(None, peer=peer)
    assert place.find(None, peer=peer, told="no such region") == believed


@pytest.mark.parametrize(
    ("forwarded", "region"),
    [
        (INDIA, "asia-south"),
        (f"{CHINA}, {INDIA}", "asia-south"),
        (f"{CHINA}, {INDIA}, 10.9.0.7", "asia-south"),
        (f"{CHINA},{INDIA}:51234,[fd09::1]:443", "asia-south"),
        (f'{CHINA}, "[{AMERICA_6}]:443"', "america-north"),
        # The proxy was called by something that it does not name: what stands before is anybody's claim.
        (f"{CHINA}, unknown", "europe-west"),
        (f"{CHINA}, 192.168.7.7", "europe-west"),
        (" ", "europe-west"),
        (",", "europe-west"),
    ],
)
def test_only_the_last_address_that_trusted_proxies_vouch_for_counts(forwarded, region):
    place = origins(TRUSTED_PROXIES="10.9.0.0/24, fd09::/64", DEFAULT_REGION="europe-west")

    assert place.find(None, peer=PROXY, forwarded=forwarded).region == region


def test_where_all_hops_are_trusted_the_first_of_them_is_the_client():
    place = origins(TRUSTED_PROXIES="10.0.0.0/8", CLIENT_REGIONS='{"10.7.0.0/16": "asia-south"}')

    assert found(place, None, peer=PROXY, forwarded="10.7.0.1, 10.9.0.2") == ("asia-south", "network")


@pytest.mark.parametrize(
    ("told", "region", "by"),
    [
        ("asia-south", "asia-south", "header"),
        (" Asia-South ", "asia-south", "header"),
        ("IN", "asia-south", "header"),
        ("fr", "europe-west", "header"),
        ("BR", "america-north", "header"),
        # What CDNs say for an unknown address and for Tor.
        ("XX", "asia-east", "country"),
        ("T1", "asia-east", "country"),
        ("", "asia-east", "country"),
    ],
)
def test_a_trusted_proxy_names_a_region_or_a_country(told, region, by):
    assert found(origins(TRUSTED_PROXIES=PROXY), None, peer=PROXY, told=told, forwarded=CHINA) == (region, by)


def test_a_trusted_proxy_that_names_neither_is_told_so():
    with pytest.raises(UnknownRegion, match=r"ISO 3166.*Near: asia-east"):
        origins(TRUSTED_PROXIES=PROXY).find(None, peer=PROXY, told="asia-eats")


def test_a_country_goes_to_the_nearest_of_the_regions_that_there_are():
    regions = '{"home": {"latitude": 48, "longitude": 2}, "abroad": {"latitude": 35, "longitude": 139}}'
    place = origins(REGIONS=regions)

    homes = {address: place.find(None, peer=address).region for address in (CHINA, IRELAND, AMERICA)}
    assert homes == {CHINA: "abroad", IRELAND: "home", AMERICA: "home"}


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("TRUSTED_PROXIES", "10.0.0.1, proxy.local", "'proxy.local' is no address"),
        ("TRUSTED_PROXIES", "10.0.0.1/8", "host bits"),
        ("TRUSTED_PROXIES", "10.0.0.0/40", "no network such as"),
        ("CLIENT_REGIONS", "asia-east", "JSON object of regions by network"),
        ("CLIENT_REGIONS", "[]", "JSON object of regions by network"),
        ("CLIENT_REGIONS", '{"10.1.0.0/16": "asia-eats"}', "Near: asia-east"),
        ("CLIENT_REGIONS", '{"10.1.0.0/16": ["asia-east"]}', "no configured region"),
        ("CLIENT_REGIONS", '{"10.1.0.0/33": "asia-east"}', "no network such as"),
        ("CLIENT_REGIONS", '{"10.1.0.0/16": "asia-east", "::ffff:10.1.0.0/112": "asia-south"}', "two regions"),
    ],
)
def test_a_wrong_setting_stops_the_api_with_its_name_and_the_rule(monkeypatch, name, value, rule):
    monkeypatch.setenv(name, value)

    with pytest.raises(SettingsError, match=rf"(?s){name}.*{rule}"):
        create_app()


def test_no_header_makes_a_caller_from_elsewhere_a_local_one(make_app, settings):
    trusted = Settings.from_environ({"TRUSTED_PROXIES": "127.0.0.1"}).trusted_proxies
    client = make_app(replace(settings, trusted_proxies=trusted)).test_client()

    for headers in ({"X-Forwarded-For": "127.0.0.1"}, {"X-Forwarded-For": ""}, {"X-Real-IP": "::1"}):
        assert client.get("/api/v1/jobs", headers=headers).status_code == 401
    spoofed = client.get(
        "/api/v1/jobs", headers={"X-Forwarded-For": "127.0.0.1"}, environ_base={"REMOTE_ADDR": "10.0.0.1"}
    )
    assert spoofed.status_code == 401


def test_the_api_says_how_it_found_a_region(make_app, settings, make_key):
    trusted = Settings.from_environ({"TRUSTED_PROXIES": PROXY}).trusted_proxies
    client = make_app(replace(settings, trusted_proxies=trusted)).test_client()
    job = {"type": "llm", "params": {"messages": [{"role": "user", "content": "hi"}]}}
    headers = {**make_key("infer"), "X-Client-Region": "FR"}

    def post(path, peer):
        return client.post(path, json=job, headers=headers, environ_base={"REMOTE_ADDR": peer})

    answers = {peer: post("/api/v1/jobs?dry_run=true", peer).json for peer in (PROXY, INDIA)}
    headers["X-Client-Region"] = "mars"
    refused = [post(path, PROXY) for path in ("/api/v1/jobs", "/api/v1/jobs?dry_run=true", "/api/v1/jobs/sync")]

    places = {peer: (answer["client_region"], answer["origin"]) for peer, answer in answers.items()}
    assert places == {PROXY: ("europe-west", FoundBy.HEADER), INDIA: ("asia-south", FoundBy.COUNTRY)}
    assert [answer.status_code for answer in refused] == [422] * 3
    assert "asia-east" in refused[0].json["errors"]["X-Client-Region"][0]
    assert post("/api/v1/jobs", INDIA).status_code == 202
