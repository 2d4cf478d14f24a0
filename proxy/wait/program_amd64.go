package wait

import _ "embed"

//go:embed wait_amd64
var program []byte
