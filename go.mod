module bauta.dev/bauta

go 1.26.0
