"""A host's workers, as pure logic: how many memory allows, how each lives and ends, who the hosts are."""
