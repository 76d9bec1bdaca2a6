"""clip4vla/web/__main__.py: the page starts with any proxy in the environment (test_web.py's does), which the hub still has."""

import os

import httpx
import pytest

from clip4vla.web.__main__ import without_proxies


@pytest.mark.parametrize(
    "proxy", ["ALL_PROXY=socks5://h:1", "all_proxy=socks5h://h:1", "https_proxy=ftp://h:1", "NO_PROXY=[::1"]
)
def test_httpx_does_not_see_the_proxies_that_it_refuses(proxy, monkeypatch):
    name, _, value = proxy.partition("=")
    monkeypatch.setenv(name, value)
    with pytest.raises((ImportError, ValueError, httpx.InvalidURL)):
        httpx.Client()
    with without_proxies():
        httpx.Client().close()
    assert os.environ[name] == value
