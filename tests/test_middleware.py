import pytest
from tests.app.models import Book

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_cookie(browser, do, kind):
    w = do(lambda r: Book.objects.create(title="x").pk)
    rd = do(lambda r: Book.objects.count())
    db = do(lambda r: Book.objects.db)
    assert browser.get(f"/{kind}/{rd}/").content == b"0"
    r = browser.get(f"/{kind}/{w}/")
    assert "pinning" in r.cookies
    print(r.cookies)
    assert browser.get(f"/{kind}/{rd}/").content == b"1"
    assert browser.get(f"/{kind}/{db}/").content == b"default"
