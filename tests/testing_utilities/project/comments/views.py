from django.http import HttpRequest, HttpResponse, HttpResponseRedirect

from pinning_middleware import ignore_writes, use_replica

from .models import Comment


def comments(request: HttpRequest) -> HttpResponse:
    if request.method == "POST":
        Comment.objects.create(text=request.POST["text"])
        return HttpResponseRedirect("/")
    return HttpResponse(", ".join(comment.text for comment in Comment.objects.all()))


async def acomments(request: HttpRequest) -> HttpResponse:
    return HttpResponse(", ".join([comment.text async for comment in Comment.objects.all()]))


def forgetful(request: HttpRequest) -> HttpResponse:
    """Lose the pin of a write, for tests to detect."""
    with ignore_writes():
        Comment.objects.create(text=request.POST["text"])
    return HttpResponseRedirect("/")


def hide(request: HttpRequest, number: int) -> HttpResponse:
    """Save an instance that may have been read from a replica, for tests to detect."""
    comment = Comment.objects.get(pk=number)
    comment.text = ""
    comment.save()
    return HttpResponse()


@use_replica
def count(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(Comment.objects.count()))
