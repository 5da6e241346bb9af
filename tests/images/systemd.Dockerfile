# A machine with systemd, PostgreSQL and a wheel of this tree, on which tests/images/test_systemd.py types docs/systemd.md.
ARG BASE=debian:trixie
FROM ${BASE}
RUN apt-get update && apt-get install -y --no-install-recommends \
    systemd systemd-sysv dbus procps python3-venv ca-certificates postgresql postgresql-17-pgvector
COPY wheels /wheels
RUN printf '[global]\nfind-links = /wheels\n' >> /etc/pip.conf
STOPSIGNAL SIGRTMIN+3
# A machine shares its mounts with services, or they would not see their credentials; a container does not.
CMD ["/bin/sh", "-c", "mount --make-rshared / && exec /sbin/init"]
